# The static program alone, as an image: no shell, no libraries, no root.
#
#   docker build -t tailwart-edge .
#
# compose.yaml runs it. `make check-release` runs what the COPY lines below put together.

FROM golang:1.27-bookworm AS go

FROM rust:1.95-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libclang-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=go /usr/local/go /usr/local/go
ENV PATH=/usr/local/go/bin:$PATH
WORKDIR /src
COPY . .
RUN make image-root

FROM scratch
COPY --from=build /src/dist/image/program/ /
# COPY keeps the mode of a directory inside the copied one: the edge refuses a state directory that others can read.
COPY --from=build --chown=65532:65532 /src/dist/image/state/ /var/lib/
USER 65532:65532
VOLUME /var/lib/tailwart-edge
EXPOSE 25 465 587 993 4190
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["/tailwart-edge", "healthcheck"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/tailwart-edge"]
CMD ["run"]
