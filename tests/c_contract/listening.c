// A node that listens, and another that connects to it.
#define _POSIX_C_SOURCE 200809L
#include <semaphore.h>
#include <string.h>

#include "check.h"

enum { PORT = 9464 };

static sem_t at_listener, at_server, at_client;

// Makes the call again after each wake of a token, while it would block.
#define WAIT(result, token, call) \
    while ((result = (call)) == TAILSCALE_WOULD_BLOCK) TRUE(sem_wait(token) == 0)

static tailscale node(const char* control_url, const char* name) {
    tailscale sd = fresh_node(control_url, "tskey-auth-test");
    EXPECT(tailscale_set_hostname(sd, name), TAILSCALE_OK);
    EXPECT(tailscale_up(sd), TAILSCALE_OK);
    return sd;
}

// A peer may not have heard of the listening node yet.
static tailscale_conn connect_to(tailscale sd, const char* host) {
    char buf[1024];
    tailscale_conn conn = 0;
    int state;
    do state = tailscale_ping(sd, host, 10000, buf, sizeof buf);
    while (state == TAILSCALE_NO_SUCH_PEER || state == TAILSCALE_TIMED_OUT);
    EXPECT(state, TAILSCALE_OK);
    EXPECT(tailscale_conn_open(sd, host, PORT, (uintptr_t)&at_client, &conn), TAILSCALE_OK);
    WAIT(state, &at_client, tailscale_conn_state(conn));
    EXPECT(state, TAILSCALE_OK);
    return conn;
}

static void talk(tailscale_conn client, tailscale_conn server) {
    char buf[16];
    ptrdiff_t count;
    EXPECT(tailscale_conn_state(server), TAILSCALE_OK);
    EXPECT(tailscale_conn_write(client, "question", 8), 8);
    EXPECT(tailscale_conn_shutdown(client), TAILSCALE_OK);
    WAIT(count, &at_server, tailscale_conn_read(server, buf, sizeof buf));
    TRUE(count == 8 && memcmp(buf, "question", 8) == 0);
    WAIT(count, &at_server, tailscale_conn_read(server, buf, sizeof buf));
    EXPECT(count, 0);
    EXPECT(tailscale_conn_write(server, "reply", 5), 5);
    EXPECT(tailscale_conn_close(server), TAILSCALE_OK);
    WAIT(count, &at_client, tailscale_conn_read(client, buf, sizeof buf));
    TRUE(count == 5 && memcmp(buf, "reply", 5) == 0);
    EXPECT(tailscale_conn_close(client), TAILSCALE_OK);
}

void listening(const char* control_url) {
    tailscale_listener listener = 0, second = 7;
    tailscale_conn server = 7;
    int code;
    TRUE(sem_init(&at_listener, 0, 0) == 0 && sem_init(&at_server, 0, 0) == 0 && sem_init(&at_client, 0, 0) == 0);
    tailscale_set_wake(wake);
    tailscale sd = node(control_url, "listens"), peer = node(control_url, "connects");
    EXPECT(tailscale_listen(sd, PORT, 2, (uintptr_t)&at_listener, &listener), TAILSCALE_OK);
    TRUE(listener != 0);
    EXPECT(tailscale_listen(sd, PORT, 2, 0, &second), TAILSCALE_BAD_STATE);
    EXPECT(tailscale_accept(listener, 0, NULL), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_accept(listener, (uintptr_t)&at_server, &server), TAILSCALE_WOULD_BLOCK);
    TRUE(second == 7 && server == 7);

    tailscale_conn client = connect_to(peer, "listens");
    WAIT(code, &at_listener, tailscale_accept(listener, (uintptr_t)&at_server, &server));
    EXPECT(code, TAILSCALE_OK);
    EXPECT(tailscale_conn_count(), 2);
    talk(client, server);

    client = connect_to(peer, "listens");  // and nobody accepts it
    EXPECT(tailscale_listener_close(listener), TAILSCALE_OK);
    char byte;
    ptrdiff_t count;
    WAIT(count, &at_client, tailscale_conn_read(client, &byte, 1));
    EXPECT(count, TAILSCALE_RESET);
    EXPECT(tailscale_conn_close(client), TAILSCALE_OK);
    expect_no_listener(listener);

    EXPECT(tailscale_listen(sd, PORT, 1, (uintptr_t)&at_listener, &listener), TAILSCALE_OK);
    EXPECT(tailscale_close(sd), TAILSCALE_OK);
    WAIT(code, &at_listener, tailscale_accept(listener, (uintptr_t)&at_server, &server));
    EXPECT(code, TAILSCALE_NOT_RUNNING);
    EXPECT(tailscale_listener_close(listener), TAILSCALE_OK);  // it has outlived its node
    EXPECT(tailscale_close(peer), TAILSCALE_OK);
    expect_no_listener(listener);
    EXPECT(tailscale_conn_count(), 0);
}
