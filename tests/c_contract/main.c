// tailscale.h as a C program sees it; tests/c_contract.rs runs it, in an empty
// directory and with a deadline. It ends at the first thing that is wrong.
//
//   main arguments                         codes for what cannot work
//   main environment                       that nothing of a credential is left there
//   main joining                           a node that never gets to a tailnet
//   main listening CONTROL_URL             one that listens, and a peer
//   main connection CONTROL_URL PEER PORT  one that does; the port is an echo's
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

void expect(const char* call, long long got, long long wanted, const char* file, int line) {
    if (got == wanted) return;
    fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", file, line, call, got, wanted);
    exit(1);
}

tailscale fresh_node(const char* control_url, const char* key) {
    char dir[] = "state.XXXXXX";
    TRUE(mkdtemp(dir) != NULL);
    tailscale sd = tailscale_new();
    EXPECT(tailscale_set_dir(sd, dir), TAILSCALE_OK);
    EXPECT(tailscale_set_control_url(sd, control_url), TAILSCALE_OK);
    if (key) EXPECT(tailscale_set_authkey(sd, key), TAILSCALE_OK);
    return sd;
}

void expect_text(tailscale sd, int (*get)(tailscale, char*, size_t)) {
    char whole[512], exact[512], cut[] = "#######";
    EXPECT(get(sd, whole, sizeof whole), 0);
    TRUE(strlen(whole) > 4);
    EXPECT(get(sd, exact, strlen(whole) + 1), 0);
    TRUE(strcmp(exact, whole) == 0);
    EXPECT(get(sd, exact, strlen(whole)), ERANGE);
    EXPECT(get(sd, cut, 5), ERANGE);
    TRUE(strncmp(cut, whole, 4) == 0 && cut[4] == '\0' && cut[5] == '#');
    EXPECT(get(sd, cut, 1), ERANGE);
    TRUE(cut[0] == '\0' && cut[1] == whole[1]);
    EXPECT(get(sd, cut + 5, 0), ERANGE);
    TRUE(cut[5] == '#');
    EXPECT(get(sd, NULL, 0), ERANGE);
    EXPECT(get(sd, NULL, sizeof whole), ERANGE);
}

void expect_no_connection(tailscale_conn closed) {
    const tailscale_conn handles[] = {closed, 0, closed + 1, UINT64_C(7) << 32, UINT64_MAX};
    EACH(handles, tailscale_conn_state(handles[i]), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_conn_read(handles[i], NULL, 1), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_conn_write(handles[i], NULL, 1), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_conn_shutdown(handles[i]), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_conn_abort(handles[i]), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_conn_close(handles[i]), TAILSCALE_BAD_HANDLE);
    EXPECT(tailscale_conn_count(), 0);
}

void expect_no_listener(tailscale_listener closed) {
    const tailscale_listener handles[] = {closed, 0, closed + 1, UINT64_C(7) << 32, UINT64_MAX};
    EACH(handles, tailscale_accept(handles[i], 0, NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_listener_close(handles[i]), TAILSCALE_BAD_HANDLE);
}

int main(int argc, char** argv) {
    if (argc == 2 && strcmp(argv[1], "arguments") == 0) arguments();
    else if (argc >= 2 && strcmp(argv[1], "environment") == 0) environment(argv[2]);
    else if (argc == 2 && strcmp(argv[1], "joining") == 0) joining();
    else if (argc == 3 && strcmp(argv[1], "listening") == 0) listening(argv[2]);
    else if (argc == 5 && strcmp(argv[1], "connection") == 0)
        connection(argv[2], argv[3], (uint16_t)atoi(argv[4]));
    else return fputs("usage: see main.c\n", stderr), 2;
    return 0;
}
