// The functions of tailscale.h, each a call to its Go half. Including the
// header that cgo generates makes a mismatch of types a compile error.
#include "tailscale.h"

#include "_cgo_export.h"

void tailscale_forget_environment(void) { TsForgetEnvironment(); }
void tailscale_set_log_upload(int on) { TsSetLogUpload(on); }
void tailscale_set_memory(int64_t in_flight, int64_t heap) { TsSetMemory(in_flight, heap); }
void tailscale_set_wake(void (*wake)(uintptr_t, uint32_t)) { TsSetWake(wake); }
const char* tailscale_version(void) { return TsVersion(); }

tailscale tailscale_new(void) { return TsNew(); }
int tailscale_set_dir(tailscale sd, const char* dir) { return TsSetDir(sd, (char*)dir); }
int tailscale_set_hostname(tailscale sd, const char* name) { return TsSetHostname(sd, (char*)name); }
int tailscale_set_control_url(tailscale sd, const char* url) { return TsSetControlURL(sd, (char*)url); }
int tailscale_set_ephemeral(tailscale sd, int ephemeral) { return TsSetEphemeral(sd, ephemeral); }
int tailscale_set_tags(tailscale sd, const char* tags) { return TsSetTags(sd, (char*)tags); }
int tailscale_set_up_timeout(tailscale sd, int64_t ms) { return TsSetUpTimeout(sd, ms); }
int tailscale_set_logfd(tailscale sd, int fd) { return TsSetLogFD(sd, fd); }
int tailscale_set_eventfd(tailscale sd, int fd) { return TsSetEventFD(sd, fd); }
int tailscale_set_authkey(tailscale sd, const char* key) { return TsSetAuthkey(sd, (char*)key); }
int tailscale_set_client_id(tailscale sd, const char* id) { return TsSetClientID(sd, (char*)id); }
int tailscale_set_client_secret(tailscale sd, const char* secret) { return TsSetClientSecret(sd, (char*)secret); }
int tailscale_set_id_token(tailscale sd, const char* token) { return TsSetIDToken(sd, (char*)token); }
int tailscale_set_preauthorized(tailscale sd, int on) { return TsSetPreauthorized(sd, on); }
int tailscale_set_interactive(tailscale sd, int on) { return TsSetInteractive(sd, on); }
int tailscale_start(tailscale sd) { return TsStart(sd); }
int tailscale_up(tailscale sd) { return TsUp(sd); }
int tailscale_close(tailscale sd) { return TsClose(sd); }
int tailscale_getips(tailscale sd, char* buf, size_t len) { return TsGetIPs(sd, buf, len); }
int tailscale_status(tailscale sd, char* buf, size_t len) { return TsStatus(sd, buf, len); }
int tailscale_figures(tailscale sd, char* buf, size_t len) { return TsFigures(sd, buf, len); }
int tailscale_errmsg(tailscale sd, char* buf, size_t len) { return TsErrmsg(sd, buf, len); }
int tailscale_abort_peer(tailscale sd, const char* ip) {
    return TsAbortPeer(sd, (char*)ip);
}
int tailscale_ping(tailscale sd, const char* host, int64_t ms, char* buf, size_t len) {
    return TsPing(sd, (char*)host, ms, buf, len);
}

int tailscale_conn_open(tailscale sd, const char* host, uint16_t port, uintptr_t token, tailscale_conn* out) {
    return TsConnOpen(sd, (char*)host, port, token, out);
}
int tailscale_listen(tailscale sd, uint16_t port, int backlog, uintptr_t token, tailscale_listener* out) {
    return TsListen(sd, port, backlog, token, out);
}
int tailscale_accept(tailscale_listener listener, uintptr_t token, tailscale_conn* out) {
    return TsAccept(listener, token, out);
}
int tailscale_listener_close(tailscale_listener listener) { return TsListenerClose(listener); }

int tailscale_conn_state(tailscale_conn conn) { return TsConnState(conn); }
ptrdiff_t tailscale_conn_read(tailscale_conn conn, void* buf, size_t len) { return TsConnRead(conn, buf, len); }
ptrdiff_t tailscale_conn_write(tailscale_conn conn, const void* buf, size_t len) {
    return TsConnWrite(conn, (void*)buf, len);
}
int tailscale_conn_shutdown(tailscale_conn conn) { return TsConnShutdown(conn); }
int tailscale_conn_abort(tailscale_conn conn) { return TsConnAbort(conn); }
int tailscale_conn_close(tailscale_conn conn) { return TsConnClose(conn); }
int64_t tailscale_conn_count(void) { return TsConnCount(); }
