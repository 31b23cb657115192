// Handles and arguments that cannot work, and what concerns the process.
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

static const char NO_TEXT[] = "\xff";  // not UTF-8

// The variables are set by who started us.
static void process(void) {
    static const char* const names[] = {"TS_AUTHKEY",  "TS_AUTH_KEY", "TS_CLIENT_SECRET", "TS_CLIENT_ID",
                                        "TS_ID_TOKEN", "TS_AUDIENCE", "TS_CONTROL_URL"};
    EACH(names, getenv(names[i]) != NULL, 1);
    tailscale_forget_environment();
    EACH(names, getenv(names[i]) == NULL, 1);
    TRUE(getenv("PATH") != NULL);
    const char* version = tailscale_version();
    TRUE(strchr(version, '.') != NULL && strspn(version, "0123456789.") == strlen(version));
    EXPECT(tailscale_conn_count(), 0);
}

// A handle that names nothing is told before any argument is looked at.
static void no_node(void) {
    tailscale closed = tailscale_new();
    EXPECT(tailscale_close(closed), TAILSCALE_OK);
    const tailscale handles[] = {closed, closed + 1, 0, -1};
    EACH(handles, tailscale_close(handles[i]), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_dir(handles[i], NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_hostname(handles[i], NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_authkey(handles[i], NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_client_id(handles[i], NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_client_secret(handles[i], NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_id_token(handles[i], NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_preauthorized(handles[i], 1), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_control_url(handles[i], NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_tags(handles[i], NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_ephemeral(handles[i], 1), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_up_timeout(handles[i], -1), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_logfd(handles[i], -1), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_set_eventfd(handles[i], -1), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_start(handles[i]), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_up(handles[i]), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_abort_peer(handles[i], NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_ping(handles[i], NULL, 0, NULL, 0), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_conn_open(handles[i], NULL, 0, 0, NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_listen(handles[i], 0, 0, 0, NULL), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_figures(handles[i], NULL, 0), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_status(handles[i], NULL, 0), TAILSCALE_BAD_HANDLE);
    EACH(handles, tailscale_getips(handles[i], NULL, 0), EBADF);
    EACH(handles, tailscale_errmsg(handles[i], NULL, 0), EBADF);
}

static void settings(tailscale sd) {
    const char* const values[] = {NULL, NO_TEXT};
    EACH(values, tailscale_set_dir(sd, values[i]), TAILSCALE_BAD_ARGUMENT);
    EACH(values, tailscale_set_hostname(sd, values[i]), TAILSCALE_BAD_ARGUMENT);
    EACH(values, tailscale_set_authkey(sd, values[i]), TAILSCALE_BAD_ARGUMENT);
    EACH(values, tailscale_set_client_id(sd, values[i]), TAILSCALE_BAD_ARGUMENT);
    EACH(values, tailscale_set_client_secret(sd, values[i]), TAILSCALE_BAD_ARGUMENT);
    EACH(values, tailscale_set_id_token(sd, values[i]), TAILSCALE_BAD_ARGUMENT);
    EACH(values, tailscale_set_control_url(sd, values[i]), TAILSCALE_BAD_ARGUMENT);
    EACH(values, tailscale_set_tags(sd, values[i]), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_set_up_timeout(sd, -1), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_set_logfd(sd, 1 << 20), TAILSCALE_BAD_ARGUMENT);  // no open descriptor
    EXPECT(tailscale_set_eventfd(sd, 1 << 20), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_start(sd), TAILSCALE_BAD_STATE);  // without a directory
    expect_text(sd, tailscale_errmsg);
}

// Of a node that is not started.
static void calls(tailscale sd) {
    char buf[512];
    tailscale_conn conn = 7;
    EXPECT(tailscale_abort_peer(sd, NULL), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_abort_peer(sd, NO_TEXT), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_abort_peer(sd, "peer"), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_abort_peer(sd, "100.64.0.1"), TAILSCALE_NOT_RUNNING);
    EXPECT(tailscale_ping(sd, NULL, 1, buf, sizeof buf), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_ping(sd, NO_TEXT, 1, buf, sizeof buf), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_ping(sd, "peer", -1, buf, sizeof buf), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_ping(sd, "peer", 1, buf, sizeof buf), TAILSCALE_NOT_RUNNING);
    EXPECT(tailscale_conn_open(sd, NULL, 25, 0, &conn), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_conn_open(sd, NO_TEXT, 25, 0, &conn), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_conn_open(sd, "peer", 0, 0, &conn), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_conn_open(sd, "peer", 25, 0, NULL), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_conn_open(sd, "peer", 25, 0, &conn), TAILSCALE_NOT_RUNNING);
    EXPECT(conn, 7);  // outputs are written on success only
    tailscale_listener listener = 7;
    EXPECT(tailscale_listen(sd, 0, 1, 0, &listener), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_listen(sd, 9464, 0, 0, &listener), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_listen(sd, 9464, 1, 0, NULL), TAILSCALE_BAD_ARGUMENT);
    EXPECT(tailscale_listen(sd, 9464, 1, 0, &listener), TAILSCALE_NOT_RUNNING);
    EXPECT(listener, 7);
    EXPECT(tailscale_figures(sd, buf, sizeof buf), TAILSCALE_NOT_RUNNING);
    EXPECT(tailscale_getips(sd, buf, 1), 0);
    EXPECT(buf[0], '\0');
    EXPECT(tailscale_getips(sd, buf, 0), ERANGE);
}

void arguments(void) {
    process();
    no_node();
    expect_no_connection(UINT64_C(1) << 32);
    expect_no_listener(UINT64_C(1) << 32);
    tailscale sd = tailscale_new();
    char nothing = '#';
    EXPECT(tailscale_errmsg(sd, &nothing, 1), 0);
    EXPECT(nothing, '\0');
    calls(sd);
    settings(sd);
    EXPECT(tailscale_close(sd), TAILSCALE_OK);
    EXPECT(tailscale_close(sd), TAILSCALE_BAD_HANDLE);
}
