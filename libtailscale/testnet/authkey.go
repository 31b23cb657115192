package testnet

import (
	"bytes"
	"encoding/json"
)

// AuthKey is a key that enrols nodes. As JSON it may also be a plain string: a
// reusable key.
type AuthKey struct {
	Key           string `json:"key"`
	SingleUse     bool   `json:"single_use"` // the first node it admits spends it
	Expired       bool   `json:"expired"`
	Ephemeral     bool   `json:"ephemeral"`     // its nodes are ephemeral, whether they ask for it or not
	Preauthorized bool   `json:"preauthorized"` // its nodes need no approval
	// Tags are the tags of its nodes. Headscale gives them to a node; with Tailscale's
	// control server the node asks for them.
	Tags []string `json:"tags"`

	spent bool
	uses  int // how many nodes it has admitted
}

func (k *AuthKey) UnmarshalJSON(b []byte) error {
	*k = AuthKey{}
	if json.Unmarshal(b, &k.Key) == nil {
		return nil
	}
	type plain AuthKey // without this method
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields() // the caller's decoder does not pass this setting on
	return dec.Decode((*plain)(k))
}

// reusableKeys makes plain keys; nil stays nil.
func reusableKeys(keys []string) []AuthKey {
	if keys == nil {
		return nil
	}
	out := []AuthKey{}
	for _, k := range keys {
		out = append(out, AuthKey{Key: k})
	}
	return out
}

// keyTable finds each of keys by its text.
func keyTable(keys []AuthKey) map[string]*AuthKey {
	table := make(map[string]*AuthKey)
	for _, k := range keys {
		table[k.Key] = &k
	}
	return table
}
