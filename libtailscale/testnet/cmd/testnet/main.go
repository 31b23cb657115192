// Program testnet runs a test tailnet and is driven by JSON lines: one command
// per line on stdin, one reply per line on stdout, in order.
//
//	{"cmd":"add_node","name":"stalwart","tags":["tag:stalwart"],"forward":{"25":"127.0.0.1:2525"}}
//	{"ok":true,"ips":["100.64.0.1","fd7a:115c:a1e0::1"],"dns_name":"stalwart.tail-test.ts.net"}
//
// A command that fails is answered with {"ok":false,"error":"..."}. The first
// line on stdout, before any command, is {"ready":true,"control_url":"..."}.
// The commands are the methods of package testnet; commands.go lists them.
//
// It ends when stdin ends, after the commands already sent, so that a test that
// is killed leaves nothing behind; and on SIGTERM or SIGINT.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"syscall"

	"libtailscale/testnet"

	"tailscale.com/types/logger"
)

// maxCommandBytes bounds one line on stdin.
const maxCommandBytes = 1 << 20

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "testnet:", err)
		os.Exit(1)
	}
}

func run() error {
	opts, err := parseFlags()
	if err != nil {
		return err
	}
	net, err := testnet.Start(opts)
	if err != nil {
		return fmt.Errorf("starting the test tailnet: %w", err)
	}
	defer net.Close()
	go closeOnSignal(net)

	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	ready := struct {
		Ready      bool   `json:"ready"`
		ControlURL string `json:"control_url"`
	}{true, net.ControlURL()}
	if err := out.Encode(ready); err != nil {
		return fmt.Errorf("writing to stdout: %w", err)
	}
	return serve(net, os.Stdin, out)
}

// parseFlags reads the command line.
func parseFlags() (testnet.Options, error) {
	var opts testnet.Options
	flag.StringVar(&opts.Host, "host", "127.0.0.1", "IP `address` of control, DERP and STUN")
	flag.StringVar(&opts.Dir, "dir", "", "`directory` for the nodes' state (default: temporary)")
	flag.Func("auth-key", "accept this auth `key`; may be repeated (default: accept any, and none)", func(key string) error {
		opts.AuthKeys = append(opts.AuthKeys, key)
		return nil
	})
	flag.BoolVar(&opts.Headscale, "headscale", false, "behave as Headscale does")
	verbose := flag.Bool("verbose", false, "log to stderr")
	flag.Parse()
	if flag.NArg() > 0 {
		return opts, fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	opts.Logf = logger.Discard
	if *verbose {
		opts.Logf = log.Printf
	} else {
		log.SetOutput(io.Discard) // some of tailscale's packages log there on their own
	}
	return opts, nil
}

// closeOnSignal ends the process on SIGTERM or SIGINT, also in the middle of a command.
func closeOnSignal(net *testnet.Net) {
	sigs := make(chan os.Signal, 1)
	signal.Notify(sigs, syscall.SIGTERM, syscall.SIGINT)
	<-sigs
	net.Close()
	os.Exit(0)
}

// serve answers commands until stdin ends.
func serve(net *testnet.Net, in io.Reader, out *json.Encoder) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxCommandBytes)
	for lines.Scan() {
		if err := out.Encode(reply(net, lines.Bytes())); err != nil {
			return fmt.Errorf("writing to stdout: %w", err)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("reading stdin: %w", err)
	}
	return nil
}
