// A node that never gets to a tailnet, and the pipes it writes to.
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

static const char NOBODY[] = "http://127.0.0.1:1";  // refuses

static char text[1 << 16];  // what a pipe holds

// A full pipe has no room for another byte.
static void make_pipe(int ends[2], int full) {
    TRUE(pipe(ends) == 0);
    if (!full) return;
    TRUE(fcntl(ends[1], F_SETFL, O_NONBLOCK) == 0);
    while (write(ends[1], "#", 1) == 1) {}
    TRUE(errno == EAGAIN && fcntl(ends[1], F_SETFL, 0) == 0);
}

// Returns once every write end is closed.
static void drain(int end) {
    while (read(end, text, sizeof text) > 0) {}
    close(end);
}

// Which the next tailscale_up uses. The node has no tags, as a key that the API
// makes would need them.
static void a_credential_after_the_start(tailscale sd) {
    int (*const apis[])(tailscale, const char*) = {tailscale_set_client_secret, tailscale_set_id_token};
    for (size_t i = 0; i < sizeof apis / sizeof *apis; i++) {
        EXPECT(apis[i](sd, "x"), TAILSCALE_OK);
        EXPECT(tailscale_up(sd), TAILSCALE_BAD_CREDENTIAL);
        EXPECT(apis[i](sd, ""), TAILSCALE_OK);  // takes it back
    }
    EXPECT(tailscale_set_client_id(sd, "x"), TAILSCALE_OK);
    EXPECT(tailscale_set_preauthorized(sd, 1), TAILSCALE_OK);
    EXPECT(tailscale_up(sd), TAILSCALE_NEEDS_LOGIN);  // neither is a credential
    EXPECT(tailscale_set_up_timeout(sd, 500), TAILSCALE_OK);
    EXPECT(tailscale_set_authkey(sd, "tskey-auth-none"), TAILSCALE_OK);
    EXPECT(tailscale_up(sd), TAILSCALE_CONTROL_UNREACHABLE);
    EXPECT(tailscale_set_authkey(sd, ""), TAILSCALE_OK);
    EXPECT(tailscale_up(sd), TAILSCALE_NEEDS_LOGIN);
}

// The library's from the call on, also when it refuses them.
static void descriptors_that_are_refused(tailscale sd) {
    int (*const takers[])(tailscale, int) = {tailscale_set_logfd, tailscale_set_eventfd};
    for (size_t i = 0; i < sizeof takers / sizeof *takers; i++) {
        int late[2], lost[2];
        make_pipe(late, 0);
        make_pipe(lost, 0);
        EXPECT(takers[i](sd, late[1]), TAILSCALE_BAD_STATE);
        EXPECT(takers[i](-1, lost[1]), TAILSCALE_BAD_HANDLE);
        drain(late[0]);
        drain(lost[0]);
    }
}

static void without_a_key(void) {
    int logs[2], events[2];
    make_pipe(logs, 1);
    make_pipe(events, 0);
    tailscale sd = fresh_node(NOBODY, NULL);
    EXPECT(tailscale_set_logfd(sd, logs[1]), TAILSCALE_OK);
    EXPECT(tailscale_set_eventfd(sd, events[1]), TAILSCALE_OK);
    EXPECT(tailscale_up(sd), TAILSCALE_NEEDS_LOGIN);  // at once, and not when time is up
    EXPECT(tailscale_set_dir(sd, "x"), TAILSCALE_BAD_STATE);
    EXPECT(tailscale_set_hostname(sd, "x"), TAILSCALE_BAD_STATE);
    EXPECT(tailscale_set_control_url(sd, "x"), TAILSCALE_BAD_STATE);
    EXPECT(tailscale_set_tags(sd, "x"), TAILSCALE_BAD_STATE);
    EXPECT(tailscale_set_ephemeral(sd, 1), TAILSCALE_BAD_STATE);
    EXPECT(tailscale_set_logfd(sd, -1), TAILSCALE_BAD_STATE);
    EXPECT(tailscale_set_eventfd(sd, -1), TAILSCALE_BAD_STATE);
    descriptors_that_are_refused(sd);
    a_credential_after_the_start(sd);
    ssize_t length = read(events[0], text, sizeof text);
    TRUE(length > 2 && strncmp(text, "{\"state\":\"", 10) == 0 && strncmp(text + length - 2, "}\n", 2) == 0);
    EXPECT(tailscale_close(sd), TAILSCALE_OK);
    drain(logs[0]);  // the write ends are the library's to close
    drain(events[0]);
}

static void with_a_file_that_is_no_state(void) {
    tailscale sd = fresh_node(NOBODY, NULL);
    FILE* file = fopen("tailscaled.state", "w");
    TRUE(file && fputs("not JSON", file) >= 0 && fclose(file) == 0);
    EXPECT(tailscale_set_dir(sd, "."), TAILSCALE_OK);
    EXPECT(tailscale_start(sd), TAILSCALE_BAD_STATE_FILE);
    EXPECT(tailscale_up(sd), TAILSCALE_BAD_STATE_FILE);
    EXPECT(tailscale_errmsg(sd, text, sizeof text), 0);
    TRUE(strstr(text, "tailscaled.state") != NULL);
    EXPECT(tailscale_close(sd), TAILSCALE_OK);
}

// And with a pipe for its events that nobody reads.
static void without_a_control_server(void) {
    int events[2];
    make_pipe(events, 1);
    tailscale sd = fresh_node(NOBODY, "tskey-auth-none");
    EXPECT(tailscale_set_eventfd(sd, events[1]), TAILSCALE_OK);
    EXPECT(tailscale_set_up_timeout(sd, 500), TAILSCALE_OK);
    EXPECT(tailscale_up(sd), TAILSCALE_CONTROL_UNREACHABLE);
    EXPECT(tailscale_errmsg(sd, text, sizeof text), 0);
    TRUE(strstr(text, "127.0.0.1:1") && strstr(text, "refused") && !strstr(text, "tskey"));
    EXPECT(tailscale_close(sd), TAILSCALE_OK);
    drain(events[0]);
}

static void* up(void* sd) {
    return (void*)(intptr_t)tailscale_up(*(tailscale*)sd);
}

static void closed_meanwhile(void) {
    pthread_t thread;
    void* code;
    tailscale sd = fresh_node(NOBODY, "tskey-auth-none");
    EXPECT(tailscale_start(sd), TAILSCALE_OK);
    TRUE(pthread_create(&thread, NULL, up, &sd) == 0);
    // Nothing tells that tailscale_up has begun; it waits for ever then.
    nanosleep(&(struct timespec){1, 0}, NULL);
    EXPECT(tailscale_close(sd), TAILSCALE_OK);
    TRUE(pthread_join(thread, &code) == 0);
    EXPECT((intptr_t)code, TAILSCALE_CANCELLED);
}

void joining(void) {
    without_a_key();
    with_a_file_that_is_no_state();
    without_a_control_server();
    closed_meanwhile();
}
