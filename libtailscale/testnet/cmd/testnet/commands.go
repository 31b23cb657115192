package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"libtailscale/testnet"
)

// command is one line on stdin: the union of all commands' fields.
type command struct {
	Cmd      string            `json:"cmd"`
	Name     string            `json:"name"`
	Node     string            `json:"node"` // the same as name
	Tags     []string          `json:"tags"`
	Forward  map[uint16]string `json:"forward"`
	Port     uint16            `json:"port"`
	To       string            `json:"to"`
	Online   *bool             `json:"online"` // null ends the override
	Keys     []testnet.AuthKey `json:"keys"`   // null: any key, or none
	Key      string            `json:"key"`
	Texts    []string          `json:"texts"`
	Required bool              `json:"required"`
	Enabled  bool              `json:"enabled"`
	Up       bool              `json:"up"`
	In       string            `json:"in"` // a Go duration; empty: never, or at
	At       time.Time         `json:"at"`
	IPs      []netip.Addr      `json:"ips"`
	Target   netip.AddrPort    `json:"target"`

	Clients []testnet.OAuthClient `json:"clients"`
}

// result is the reply's fields beside ok.
type result map[string]any

// commands are all commands by name.
var commands = map[string]func(*testnet.Net, *command) (result, error){
	"add_node": func(n *testnet.Net, c *command) (result, error) {
		return nodeInfo(n.AddNode(testnet.NodeConfig{Name: c.Name, Tags: c.Tags, Forward: c.Forward}))
	},
	"start_node":        func(n *testnet.Net, c *command) (result, error) { return nodeInfo(n.StartNode(c.Name)) },
	"stop_node":         func(n *testnet.Net, c *command) (result, error) { return nil, n.StopNode(c.Name) },
	"remove_node":       func(n *testnet.Net, c *command) (result, error) { return nil, n.RemoveNode(c.Name) },
	"forward":           func(n *testnet.Net, c *command) (result, error) { return nil, n.Forward(c.Name, c.Port, c.To) },
	"show_peers":        func(n *testnet.Net, c *command) (result, error) { return nil, n.ShowPeers(c.Name) },
	"unforward":         func(n *testnet.Net, c *command) (result, error) { return nil, n.Unforward(c.Name, c.Port) },
	"deny_port":         func(n *testnet.Net, c *command) (result, error) { return nil, n.DenyPort(c.Name, c.Port) },
	"allow_port":        func(n *testnet.Net, c *command) (result, error) { return nil, n.AllowPort(c.Name, c.Port) },
	"drop_port":         func(n *testnet.Net, c *command) (result, error) { return nil, n.DropPort(c.Name, c.Port) },
	"pass_port":         func(n *testnet.Net, c *command) (result, error) { return nil, n.PassPort(c.Name, c.Port) },
	"hide_node":         func(n *testnet.Net, c *command) (result, error) { return nil, n.HideNode(c.Name) },
	"show_node":         func(n *testnet.Net, c *command) (result, error) { return nil, n.ShowNode(c.Name) },
	"isolate_node":      func(n *testnet.Net, c *command) (result, error) { return nil, n.IsolateNode(c.Name) },
	"rejoin_node":       func(n *testnet.Net, c *command) (result, error) { return nil, n.RejoinNode(c.Name) },
	"set_online":        func(n *testnet.Net, c *command) (result, error) { return nil, n.SetOnline(c.Name, c.Online) },
	"set_tags":          func(n *testnet.Net, c *command) (result, error) { return nil, n.SetTags(c.Name, c.Tags) },
	"set_health":        func(n *testnet.Net, c *command) (result, error) { return nil, n.SetHealth(c.Name, c.Texts) },
	"set_ips":           setIPs,
	"set_key_expiry":    setKeyExpiry,
	"approve":           func(n *testnet.Net, c *command) (result, error) { return nil, n.Approve(c.Name) },
	"revoke_approval":   func(n *testnet.Net, c *command) (result, error) { return nil, n.RevokeApproval(c.Name) },
	"complete_login":    func(n *testnet.Net, c *command) (result, error) { return nil, n.CompleteLogin(c.Name) },
	"auth_keys":         func(n *testnet.Net, c *command) (result, error) { n.SetAuthKeyTable(c.Keys); return nil, nil },
	"key_uses":          func(n *testnet.Net, c *command) (result, error) { return result{"uses": n.KeyUses(c.Key)}, nil },
	"permit_tags":       func(n *testnet.Net, c *command) (result, error) { n.PermitTags(c.Tags); return nil, nil },
	"require_approval":  func(n *testnet.Net, c *command) (result, error) { n.RequireApproval(c.Required); return nil, nil },
	"require_flow_logs": func(n *testnet.Net, c *command) (result, error) { return nil, n.RequireFlowLogs(c.Required) },
	"derp_only":         func(n *testnet.Net, c *command) (result, error) { return nil, n.SetDERPOnly(c.Enabled) },
	"oauth_clients":     func(n *testnet.Net, c *command) (result, error) { n.SetOAuthClients(c.Clients); return nil, nil },
	"set_api":           func(n *testnet.Net, c *command) (result, error) { n.SetAPI(c.Up); return nil, nil },
	"api_stats":         func(n *testnet.Net, c *command) (result, error) { return result{"requests": n.APIRequests()}, nil },
	"stop_control":      func(n *testnet.Net, c *command) (result, error) { n.StopControl(); return nil, nil },
	"start_control":     func(n *testnet.Net, c *command) (result, error) { return nil, n.StartControl() },
	"alias_control":     aliasControl,
	"stop_derp":         func(n *testnet.Net, c *command) (result, error) { n.StopDERP(); return nil, nil },
	"start_derp":        func(n *testnet.Net, c *command) (result, error) { return nil, n.StartDERP() },
	"nodes":             func(n *testnet.Net, c *command) (result, error) { return result{"nodes": n.Nodes()}, nil },
	"stats":             stats,
	"reach": func(n *testnet.Net, c *command) (result, error) {
		addr, err := n.Reach(c.Name, c.Target)
		return result{"addr": addr}, err
	},
}

// reply carries out one line and returns what to answer.
func reply(net *testnet.Net, line []byte) result {
	res, err := execute(net, line)
	if err != nil {
		return result{"ok": false, "error": err.Error()}
	}
	if res == nil {
		res = result{}
	}
	res["ok"] = true
	return res
}

func execute(net *testnet.Net, line []byte) (result, error) {
	var c command
	dec := json.NewDecoder(bytes.NewReader(line))
	// A misspelt field must be an error and not count as left out.
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return nil, fmt.Errorf("reading the command: %w", err)
	}
	if c.Name == "" {
		c.Name = c.Node
	}
	run := commands[c.Cmd]
	if run == nil {
		return nil, fmt.Errorf("unknown command %q", c.Cmd)
	}
	res, err := run(net, &c)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.Cmd, err)
	}
	return res, nil
}

func nodeInfo(info testnet.NodeInfo, err error) (result, error) {
	return result{"ips": info.IPs, "dns_name": info.DNSName}, err
}

func setKeyExpiry(n *testnet.Net, c *command) (result, error) {
	if c.In == "" {
		return nil, n.SetKeyExpiry(c.Name, c.At)
	}
	in, err := time.ParseDuration(c.In)
	if err != nil {
		return nil, errors.New(`"in" must be a duration such as "-1m" or "48h"`)
	}
	return nil, n.SetKeyExpiry(c.Name, time.Now().Add(in))
}

func aliasControl(n *testnet.Net, _ *command) (result, error) {
	url, err := n.AliasControl()
	return result{"url": url}, err
}

// setIPs takes a list, like those in replies, although the v6 address follows from the
// v4 address.
func setIPs(n *testnet.Net, c *command) (result, error) {
	if len(c.IPs) != 1 {
		return nil, errors.New(`"ips" must be one v4 address`)
	}
	return nil, n.SetIP(c.Name, c.IPs[0])
}

func stats(n *testnet.Net, c *command) (result, error) {
	st, err := n.Stats(c.Name)
	return result{"open": st.Open, "total": st.Total}, err
}
