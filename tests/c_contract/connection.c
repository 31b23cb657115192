// A node on a tailnet, and its connections to a port that echoes.
#define _POSIX_C_SOURCE 200809L
#include <semaphore.h>
#include <string.h>

#include "check.h"

void wake(uintptr_t token, uint32_t ready) {
    if (ready & (TAILSCALE_READABLE | TAILSCALE_WRITABLE)) sem_post((sem_t*)token);
}

static sem_t woken;

// Makes the call again after each wake, while it would block.
#define WAIT(result, call) \
    while ((result = (call)) == TAILSCALE_WOULD_BLOCK) TRUE(sem_wait(&woken) == 0)

static tailscale_conn open_to(tailscale sd, const char* peer, uint16_t port) {
    tailscale_conn conn = 0;
    int state;
    EXPECT(tailscale_conn_open(sd, peer, port, (uintptr_t)&woken, &conn), TAILSCALE_OK);
    TRUE(conn != 0);
    WAIT(state, tailscale_conn_state(conn));
    EXPECT(state, TAILSCALE_OK);
    EXPECT(tailscale_conn_count(), 1);
    return conn;
}

static void arguments_of_a_live_node(tailscale sd, const char* peer) {
    char buf[512];
    tailscale_conn conn = 7;
    expect_text(sd, tailscale_getips);
    EXPECT(tailscale_conn_open(sd, peer, 0, 0, &conn), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_conn_open(sd, peer, 25, 0, NULL), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_conn_open(sd, "nobody", 25, 0, &conn), TAILSCALE_NO_SUCH_PEER);
    EXPECT(tailscale_conn_open(sd, "c-contract", 25, 0, &conn), TAILSCALE_IS_SELF);
    EXPECT(conn, 7);
    EXPECT(tailscale_ping(sd, "nobody", 1, buf, sizeof buf), TAILSCALE_NO_SUCH_PEER);
    EXPECT(tailscale_ping(sd, peer, 10000, buf, 9), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_ping(sd, peer, 10000, buf, sizeof buf), TAILSCALE_OK);
    EXPECT(tailscale_ping(sd, peer, INT64_MAX, buf, sizeof buf), TAILSCALE_OK);  // no end is not at once
    TRUE(strncmp(buf, "{\"ip\":\"100.64.", 14) == 0 && strstr(buf, "\"answered\":true"));
}

static void figures(tailscale sd) {
    char buf[1024];
    EXPECT(tailscale_figures(sd, buf, 9), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_figures(sd, buf, sizeof buf), TAILSCALE_OK);
    TRUE(strncmp(buf, "{\"goroutines\":", 14) == 0 && strstr(buf, "\"handles\":0,"));
}

static void from_open_to_close(tailscale_conn conn) {
    char buf[16];
    ptrdiff_t count;
    EXPECT(tailscale_conn_read(conn, buf, sizeof buf), TAILSCALE_WOULD_BLOCK);
    EXPECT(tailscale_conn_read(conn, NULL, 1), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_conn_write(conn, NULL, 1), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_conn_read(conn, NULL, 0), 0);
    EXPECT(tailscale_conn_write(conn, NULL, 0), 0);
    EXPECT(tailscale_conn_write(conn, "x", 1), 1);
    WAIT(count, tailscale_conn_read(conn, buf, sizeof buf));
    TRUE(count == 1 && buf[0] == 'x');
    EXPECT(tailscale_conn_shutdown(conn), TAILSCALE_OK);
    EXPECT(tailscale_conn_write(conn, "x", 1), TAILSCALE_CLOSED);
    WAIT(count, tailscale_conn_read(conn, buf, sizeof buf));
    EXPECT(count, 0);
    EXPECT(tailscale_conn_close(conn), TAILSCALE_OK);
    expect_no_connection(conn);
}

static void aborted(tailscale_conn conn) {
    EXPECT(tailscale_conn_abort(conn), TAILSCALE_OK);
    EXPECT(tailscale_conn_state(conn), TAILSCALE_RESET);
    EXPECT(tailscale_conn_write(conn, "x", 1), TAILSCALE_RESET);
    EXPECT(tailscale_conn_close(conn), TAILSCALE_OK);
}

void connection(const char* control_url, const char* peer, uint16_t port) {
    char byte;
    TRUE(sem_init(&woken, 0, 0) == 0);
    tailscale_set_wake(wake);
    tailscale sd = fresh_node(control_url, "tskey-auth-test");
    EXPECT(tailscale_set_hostname(sd, "c-contract"), TAILSCALE_OK);
    EXPECT(tailscale_up(sd), TAILSCALE_OK);
    arguments_of_a_live_node(sd, peer);
    figures(sd);
    from_open_to_close(open_to(sd, peer, port));
    aborted(open_to(sd, peer, port));
    tailscale_conn conn = open_to(sd, peer, port);
    EXPECT(tailscale_close(sd), TAILSCALE_OK);
    EXPECT(tailscale_conn_read(conn, &byte, 1), TAILSCALE_RESET);
    EXPECT(tailscale_conn_close(conn), TAILSCALE_OK);  // it has outlived its node
    expect_no_connection(conn);
}
