// The C contract of libtailscale: a tailnet node inside this process, and
// TCP connections from it to peers of the tailnet.
//
// Three kinds of handle exist. A `tailscale` is a node; a `tailscale_conn` is
// one TCP connection of a node, a `tailscale_listener` a port at which it takes
// connections. None is ever reused for another object, so a stale handle is
// answered with TAILSCALE_BAD_HANDLE and cannot affect another connection.
//
// The life-cycle calls carry the names and the contracts of upstream
// libtailscale. The connection calls are our own: a connection is not a file
// descriptor but a handle with readiness, so that an idle connection costs no
// descriptor, no thread, no goroutine and no buffer.
//
// Conventions
//   - Results: zero or a positive count on success, a negative
//     tailscale_code otherwise. Outputs are written only on success, unless
//     the function says otherwise.
//   - Strings passed in are NUL-terminated UTF-8 and copied before the call
//     returns. Buffers passed in are not kept after the call returns.
//   - Threads: node calls may be made from any thread at any time, also
//     concurrently. Calls on one connection or listener must not overlap each
//     other; different ones are independent.
//   - A Go panic behind a call becomes TAILSCALE_PANIC; it does not unwind
//     into the caller.
//   - Nothing is ever sent on the host's network on behalf of a connection:
//     names are looked up in the tailnet's network map alone and packets
//     leave through WireGuard alone.
#ifndef TAILSCALE_H
#define TAILSCALE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A node. Valid from tailscale_new until tailscale_close.
typedef int tailscale;

// A connection. Valid from tailscale_conn_open or tailscale_accept until
// tailscale_conn_close. Zero is never a valid handle.
typedef uint64_t tailscale_conn;

// A listener. Valid from tailscale_listen until tailscale_listener_close. Zero is
// never a valid handle.
typedef uint64_t tailscale_listener;

// Why a call failed. The numbers are stable.
enum tailscale_code {
    TAILSCALE_OK = 0,
    // Anything not named below; tailscale_errmsg has the text for node calls.
    TAILSCALE_ERROR = -1,
    // Not ready; the wake function will be called.
    TAILSCALE_WOULD_BLOCK = -2,
    // The handle names no live object.
    TAILSCALE_BAD_HANDLE = -3,
    // An argument is out of range, not UTF-8, or NULL.
    TAILSCALE_BAD_ARGUMENT = -4,
    // The call came at the wrong time (for example a setting after start).
    TAILSCALE_BAD_STATE = -5,
    // A bug on the Go side was caught; the log has its text.
    TAILSCALE_PANIC = -6,

    // Connections.
    // The node has no place on the tailnet at the moment.
    TAILSCALE_NOT_RUNNING = -20,
    // The network map holds no peer of that name or address.
    TAILSCALE_NO_SUCH_PEER = -21,
    // The name or address is this node itself.
    TAILSCALE_IS_SELF = -22,
    // The peer answered that nothing listens on the port.
    TAILSCALE_REFUSED = -23,
    // No answer within TCP's own limits.
    TAILSCALE_TIMED_OUT = -24,
    // The peer reset the connection.
    TAILSCALE_RESET = -25,
    // Writing after tailscale_conn_shutdown.
    TAILSCALE_CLOSED = -26,
    // Every local port for connections to that peer and port is in use.
    TAILSCALE_NO_PORTS = -27,
    // The stack has no route to the address.
    TAILSCALE_UNREACHABLE = -28,
    // The peer says that the tailnet's policy does not let this node reach the port.
    TAILSCALE_DENIED = -29,
    // The peer says that it takes no connections at all (shields up).
    TAILSCALE_SHIELDS_UP = -30,

    // Joining (tailscale_up).
    // The node is not enrolled and there is no auth key.
    TAILSCALE_NEEDS_LOGIN = -40,
    // The control server refused the node, or its API refused to make a key;
    // the text is the server's or the API's.
    TAILSCALE_AUTH_REFUSED = -41,
    // An admin must approve the node first.
    TAILSCALE_NEEDS_APPROVAL = -42,
    // The control server, or its API, could not be reached; the text names it.
    TAILSCALE_CONTROL_UNREACHABLE = -43,
    // The time set by tailscale_set_up_timeout passed, and no other code says why.
    TAILSCALE_UP_TIMED_OUT = -44,
    // tailscale_close was called during the call.
    TAILSCALE_CANCELLED = -45,
    // The control server does not let this node have its tags; the text is
    // the server's.
    TAILSCALE_TAGS_REFUSED = -46,
    // The tailnet has network flow logs and lets nobody in who does not upload
    // Tailscale's logs, see tailscale_set_log_upload.
    TAILSCALE_NEEDS_LOG_UPLOAD = -47,
    // The control server's certificate is not accepted, because this machine's
    // clock is wrong; the text has both times.
    TAILSCALE_CLOCK_WRONG = -48,
    // The file of the node's identity cannot be understood (tailscale_start and
    // tailscale_up); the text names it.
    TAILSCALE_BAD_STATE_FILE = -49,
    // The credential cannot become an auth key here; the text says why.
    TAILSCALE_BAD_CREDENTIAL = -50,
    // The control server answers, but a proxy in front of it does not pass on
    // the upgrade to the control protocol; the text has the answer.
    TAILSCALE_UPGRADE_BLOCKED = -51,
    // The identity belongs, or may belong, to another control server, which is
    // one with another key (tailscale_start and tailscale_up); the text has both
    // URLs.
    TAILSCALE_OTHER_CONTROL = -52,
    // The node's key has expired, and the control server (a Headscale) would keep that
    // expiry whatever the node enrols with; the credential was not used.
    TAILSCALE_KEY_EXPIRED = -53,
};

// What a wake reports. Both bits are set when the connection failed or ended.
enum tailscale_ready {
    TAILSCALE_READABLE = 1,
    TAILSCALE_WRITABLE = 2,
};

// ---------------------------------------------------------------------------
// The process
// ---------------------------------------------------------------------------

// Removes these variables from the environment, of C and of the Go runtime:
//   - those from which tsnet would take credentials or a control server without
//     the caller's knowledge: TS_AUTHKEY, TS_AUTH_KEY, TS_CLIENT_SECRET,
//     TS_CLIENT_ID, TS_ID_TOKEN, TS_AUDIENCE, TS_CONTROL_URL, and
//     TS_AUTHKEY_FILE, which may hold a key by mistake;
//   - two of Tailscale's own settings: one logs the auth key, the other asks for
//     one without need;
//   - those by which systemd talks to this process (NOTIFY_SOCKET, WATCHDOG_*,
//     LISTEN_*, FDSTORE), so that no child has them.
// The values of the credential variables are also overwritten in memory, so
// that /proc/PID/environ does not show them. Call it once, after copying the
// variables and before other threads read the environment, since it uses
// unsetenv(3) and setenv(3). It sets what the first tailscale_start would
// otherwise set (no log upload, no log directory in /var/lib/tailscale).
void tailscale_forget_environment(void);

// Nonzero: the nodes of this process upload Tailscale's own logs to Tailscale,
// as its own programs do; the default is not to. Call it before the first
// tailscale_start and, like tailscale_forget_environment, before other threads
// read the environment.
void tailscale_set_log_upload(int on);

// Sets two bounds on the memory of all nodes of this process, in bytes.
// `in_flight` is for what all connections together hold (sent and not
// acknowledged, received and not read) beyond the floor of each connection; the
// more connections there are, the lower the floor. `heap` is for Go's heap: the
// garbage collector tries to keep it below the bound. Call it at any time; zero
// or less leaves a bound as it is.
void tailscale_set_memory(int64_t in_flight, int64_t heap);

// Sets the one function that is called when a connection or listener becomes
// ready. `token` is what tailscale_conn_open, tailscale_accept or
// tailscale_listen was given, `ready` a set of tailscale_ready bits. It may be
// called from any thread, concurrently, under locks of the network stack and
// during a call on the same connection: it must not block and must not call
// back into this library. Set it once, before the first of those.
void tailscale_set_wake(void (*wake)(uintptr_t token, uint32_t ready));

// The version of Tailscale that is linked in, such as "1.104.5". Static.
const char* tailscale_version(void);

// ---------------------------------------------------------------------------
// A node's life
// ---------------------------------------------------------------------------

// Creates a node that is not started. Never fails.
tailscale tailscale_new(void);

// Settings, all before tailscale_start or tailscale_up; TAILSCALE_BAD_STATE
// afterwards.
//
// The directory of the node's identity; required unless it is ephemeral.
int tailscale_set_dir(tailscale sd, const char* dir);
// The name asked for on the tailnet; the control server may append "-1".
int tailscale_set_hostname(tailscale sd, const char* hostname);
// Default: Tailscale's own control server.
int tailscale_set_control_url(tailscale sd, const char* control_url);
// Nonzero: the node's identity is in memory only, whatever tailscale_set_dir
// says, and the control server forgets the node at tailscale_close.
int tailscale_set_ephemeral(tailscale sd, int ephemeral);
// Comma-separated, such as "tag:reverse-proxy". (Not in upstream.)
int tailscale_set_tags(tailscale sd, const char* tags);
// How long tailscale_up waits, in milliseconds; 0, the default, is for ever.
// May be changed at any time. (Not in upstream.)
int tailscale_set_up_timeout(tailscale sd, int64_t timeout_ms);
// Where Tailscale's log lines go, one write each; -1, the default, drops
// them. The library owns the descriptor from here on: it makes the descriptor
// non-blocking, and closes it in tailscale_close, or at once when the call fails.
// Lines are dropped while the descriptor takes no more.
int tailscale_set_logfd(tailscale sd, int fd);
// Where the node's state goes: one line of JSON for every change, beginning
// with the state at start. Ownership as for tailscale_set_logfd. While there is
// no room, the newest line waits and replaces the one before: each line is the
// whole state. (Not in upstream.)
//   {"state":"Running","name":"edge.example.ts.net","ips":["100.64.0.1"],
//    "tags":["tag:reverse-proxy"],"in_map_poll":true,
//    "key_expiry":"2027-01-01T00:00:00Z","login_url":"","health":[],
//    "enrolled":true,"removed":false,"needs_log_upload":false,"relay":"",
//    "network_changes":0,"wake_ups":0,"unsaved":"","control_error":"",
//    "control_advice":"","home_region":"fra","home_region_id":4,
//    "control_moved_from":""}
// "key_expiry": left out for a key that does not expire;
// "enrolled": the node has a key, valid or not;
// "removed": the control server no longer knows the node;
// "needs_log_upload": the tailnet has stopped the node because it uploads no logs;
// "relay": what is wrong with the relays, empty when nothing is;
// "network_changes", "wake_ups": how often this machine's network has changed,
//   and how often the machine woke from sleep, since the start;
// "unsaved": why the identity could not be saved, which is tried again;
// "control_error": the last error with the control server since it was last
//   heard: why it could not be reached, or its answer;
// "control_advice": what to do about that error, where it is known;
// "home_region", "home_region_id": the region of the node's home relay, empty
//   and 0 without one;
// "control_moved_from": the former URL of the same control server (it has the
//   same key), empty if the URL has not changed.
// Texts that come from elsewhere are in one line, without control characters
// and keys.
int tailscale_set_eventfd(tailscale sd, int fd);

// What the node may enrol with. Used only when the control server asks for a
// login, so that neither a key that has expired nor an API that is down ever
// stops an enrolled node. It may be set at any time, also after
// TAILSCALE_NEEDS_LOGIN: the next tailscale_up uses it. An empty string takes a
// value back. In this order:
// - an auth key;
int tailscale_set_authkey(tailscale sd, const char* authkey);
// - the secret of an OAuth client, from which the control server's API makes an
//   auth key with the node's tags (required then), ephemeral if the node is;
//   the client's id may be left out with Tailscale;
int tailscale_set_client_id(tailscale sd, const char* client_id);
int tailscale_set_client_secret(tailscale sd, const char* client_secret);
// - a federated identity, for the same: a client id and a token of its identity
//   provider.
// Neither the secret nor the token is sent over http, except to this host itself.
int tailscale_set_id_token(tailscale sd, const char* id_token);
// Nonzero: nodes with keys that the API makes need no device approval. (Not in
// upstream, like the three above.)
int tailscale_set_preauthorized(tailscale sd, int preauthorized);

// Nonzero: where tailscale_up would fail with TAILSCALE_NEEDS_LOGIN, it waits
// for a person to visit the "login_url" of the node's state instead. The
// time-out of tailscale_up stands still while there is a "login_url". May be
// changed at any time. (Not in upstream.)
int tailscale_set_interactive(tailscale sd, int on);

// Starts the node without waiting for the tailnet. Optional:
// tailscale_up does it. Zero or a negative code, see tailscale_errmsg.
int tailscale_start(tailscale sd);

// Joins the tailnet and returns when the node is running and the control server
// has been heard. For a node that is running already it returns at once, unless
// that server is out of reach. Call it again after a failure, or for a node
// that has lost its place (its key expired, it was removed, or stopped because
// it uploads no logs). Threads that call it at the same time take turns. Fails with one
// of the joining codes; tailscale_errmsg has the text. A node that is enrolled
// and cannot reach its control server gets TAILSCALE_UP_TIMED_OUT and goes on
// trying in the background; TAILSCALE_CONTROL_UNREACHABLE means it was never
// enrolled.
int tailscale_up(tailscale sd);

// Stops the node, cancels a pending tailscale_up, and waits up to two seconds
// for bytes already written to be acknowledged by the peers, and up to five for
// the control server to forget an ephemeral node. Connections that are still
// open fail with TAILSCALE_RESET; their handles stay valid until closed. Zero,
// TAILSCALE_BAD_HANDLE, or TAILSCALE_CONTROL_UNREACHABLE when the node is closed
// but, being ephemeral, could not be taken off the tailnet.
int tailscale_close(tailscale sd);

// Writes the node's addresses, comma-separated, NUL-terminated. Zero, EBADF,
// or ERANGE when they do not fit (upstream's contract).
int tailscale_getips(tailscale sd, char* buf, size_t buflen);

// Writes the node's state as it is now, as a line for tailscale_set_eventfd has
// it, NUL-terminated. Zero, TAILSCALE_BAD_HANDLE, TAILSCALE_NOT_RUNNING before
// the start and after the close, or TAILSCALE_BAD_ARGUMENT when the buffer is too
// small. (Not in upstream.)
int tailscale_status(tailscale sd, char* buf, size_t buflen);

// Writes the resources that the library uses now, as a JSON object,
// NUL-terminated:
//   {"goroutines":80,"heap_in_use_bytes":9000000,"heap_idle_bytes":3000000,
//    "heap_released_bytes":2000000,"gc_count":12,"gc_pause_seconds":0.002,
//    "gomaxprocs":2,"endpoints":4,"handles":3,"in_flight_bytes":0,
//    "in_flight_max_bytes":16777216}
// Those up to "gomaxprocs" are Go's, for all nodes of the process; "endpoints"
// are the TCP endpoints of this node's stack (some outlive their handle);
// "handles" is tailscale_conn_count; the last two are how much all connections
// hold beyond their floors, and the most that they may hold, see
// tailscale_set_memory. It takes microseconds and does not stop Go's threads.
// Returns as tailscale_status. (Not in upstream.)
int tailscale_figures(tailscale sd, char* buf, size_t buflen);

// Writes the text of the last failed node call, NUL-terminated. Zero, EBADF,
// or ERANGE when it was cut to fit (upstream's contract). It is the last
// failure of any thread: callers that share a node see each other's.
int tailscale_errmsg(tailscale sd, char* buf, size_t buflen);

// Pings a peer (by name or address) below TCP and reports what is known of it.
// Blocks for up to timeout_ms, and two seconds more when the peer is silent, to
// see whether the control server answers ("network"). Writes one JSON object,
// NUL-terminated, also when the peer did not answer:
//   {"ip":"100.64.0.2","answered":true,"latency_ms":1.2,
//    "direct":"192.0.2.7:41641","relay":"","online":true,"network":true,
//    "last_seen":""}
// Zero when it answered, TAILSCALE_TIMED_OUT when it did not,
// TAILSCALE_NO_SUCH_PEER, TAILSCALE_IS_SELF, TAILSCALE_NOT_RUNNING, or
// TAILSCALE_BAD_ARGUMENT when the buffer is too small. (Not in upstream.)
int tailscale_ping(tailscale sd, const char* host, int64_t timeout_ms,
                   char* buf, size_t buflen);

// Resets every connection to a peer's address, whoever holds it. Call it when the
// peer is gone and cannot close its connections itself. The owners are woken and
// see TAILSCALE_RESET. Zero also when there was none,
// TAILSCALE_BAD_ARGUMENT when ip is no address, or TAILSCALE_NOT_RUNNING before
// the start and while closing. (Not in upstream.)
int tailscale_abort_peer(tailscale sd, const char* ip);

// ---------------------------------------------------------------------------
// Connections (none of this is in upstream, whose tailscale_listen and
// tailscale_accept have other arguments)
// ---------------------------------------------------------------------------

// Begins to connect to a peer. `host` is a MagicDNS name, its first label, or
// a tailnet address; `port` is 1 to 65535. On success the handle is written
// and the connection is being made: wait for a wake and ask
// tailscale_conn_state. The token is given to the wake function until
// tailscale_conn_close returns.
int tailscale_conn_open(tailscale sd, const char* host, uint16_t port,
                        uintptr_t token, tailscale_conn* conn_out);

// Takes connections from peers to `port` (1 to 65535) of the node's own
// addresses. The tailnet's policy decides who may connect. At most `backlog` of
// them (at least 1) wait to be accepted; more are refused. The wake function
// gets the token, with TAILSCALE_READABLE, when a connection has come and when
// the node is closed, but not after tailscale_listener_close has returned. The
// listener stays when the node loses its place on the tailnet and gets another.
// Zero, TAILSCALE_BAD_STATE when the node listens on that port already, or
// TAILSCALE_NOT_RUNNING before the start and after the close.
int tailscale_listen(tailscale sd, uint16_t port, int backlog, uintptr_t token,
                     tailscale_listener* listener_out);

// Takes a connection. On success the handle is written; the connection is like
// a connected one of tailscale_conn_open, with `token` as its token.
// TAILSCALE_WOULD_BLOCK when there is none, TAILSCALE_NOT_RUNNING when there
// will be none because the node was closed.
int tailscale_accept(tailscale_listener listener, uintptr_t token,
                     tailscale_conn* conn_out);

// Gives the handle back and resets the connections that were not accepted. When it
// returns, the token will not be used again and may be freed; it may be called after
// the node was closed.
int tailscale_listener_close(tailscale_listener listener);

// Zero when connected, TAILSCALE_WOULD_BLOCK while connecting, or the code of
// the failure.
int tailscale_conn_state(tailscale_conn conn);

// Reads up to buflen bytes. A positive count; zero at the peer's end of
// stream (or when buflen is zero); TAILSCALE_WOULD_BLOCK; or the code of the
// failure. The code comes after every byte that was received before the failure,
// and again at every later call.
ptrdiff_t tailscale_conn_read(tailscale_conn conn, void* buf, size_t buflen);

// Writes some of the bytes. A positive count, possibly less than buflen;
// TAILSCALE_WOULD_BLOCK; TAILSCALE_CLOSED; or the code of the failure.
ptrdiff_t tailscale_conn_write(tailscale_conn conn, const void* buf,
                               size_t buflen);

// Ends the writing side (FIN after the bytes written so far); reading goes
// on. Zero or the code of the failure.
int tailscale_conn_shutdown(tailscale_conn conn);

// Resets the connection (RST); the handle still has to be closed.
int tailscale_conn_abort(tailscale_conn conn);

// Gives the handle back. When it returns, the token will not be used again
// and may be freed. Bytes written before are still delivered, followed by a
// FIN, unless received bytes were left unread: then the peer sees a reset.
int tailscale_conn_close(tailscale_conn conn);

// For leak checks: the number of connection handles not closed yet.
int64_t tailscale_conn_count(void);

#ifdef __cplusplus
}
#endif

#endif
