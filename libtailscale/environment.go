package main

import (
	"os"
	"slices"
	"strconv"
	"sync"

	"tailscale.com/envknob"
)

// credentialVariables are those that tsnet reads by itself
// (tsnet/tsnet.go, getAuthKey and following), and one more that may hold a key
// by mistake.
var credentialVariables = []string{
	"TS_AUTHKEY", "TS_AUTH_KEY", "TS_CLIENT_SECRET", "TS_CLIENT_ID",
	"TS_ID_TOKEN", "TS_AUDIENCE", "TS_CONTROL_URL", "TS_AUTHKEY_FILE",
}

// supervisorVariables are how systemd talks to this process; a child must not have
// them.
var supervisorVariables = []string{
	"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC",
	"LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE",
}

// forbiddenKnobs are Tailscale's own settings that would break a promise of
// this library: the first logs the auth key (control/controlclient/direct.go),
// the second asks for one although the node is enrolled (tsnet/tsnet.go).
var forbiddenKnobs = []string{"TS_DEBUG_REGISTER", "TSNET_FORCE_LOGIN"}

// forgetEnvironment leaves no credentials for Tailscale to find. It also sets the
// variables that every node of the process needs, since the caller promises that
// nothing else reads the environment now.
func forgetEnvironment() {
	for _, name := range slices.Concat(credentialVariables, supervisorVariables) {
		os.Unsetenv(name)
	}
	for _, name := range forbiddenKnobs {
		if os.Getenv(name) != "" {
			envknob.Setenv(name, "") // it may have been read already
		}
		os.Unsetenv(name)
	}
	settleEnvironment()
}

// setLogUpload changes whether Tailscale's logs go to Tailscale. It is a setting
// of the process, read when a node starts.
func setLogUpload(on bool) {
	settleEnvironment()
	envknob.Setenv("TS_NO_LOGS_NO_SUPPORT", strconv.FormatBool(!on))
}

// settleEnvironment turns Tailscale's log upload off, and keeps Tailscale away from
// /var/lib/tailscale, which belongs to the host's tailscaled: it would make a log
// directory there (logpolicy.LogsDir), and panic if it cannot. Nothing is written to
// that directory: its logs are of sockstats, which the archive lacks.
var settleEnvironment = sync.OnceFunc(func() {
	envknob.SetNoLogsNoSupport()
	if os.Getenv("TS_LOGS_DIR") == "" {
		os.Setenv("TS_LOGS_DIR", "/")
	}
})
