package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"tailscale.com/atomicfile"
	"tailscale.com/ipn"
)

// stateFile is the file of the node's identity, in the format of Tailscale's own
// store (ipn/store.FileStore). That one forgets that a write has failed: the
// backend logs it and goes on, and the same content is taken for saved from then
// on. This one remembers, and tries again.
type stateFile struct {
	path string

	mu      sync.Mutex
	entries map[ipn.StateKey][]byte
	failed  error // of the last attempt to save; nil when the file is up to date
}

// openStateFile reads the file, or makes it. One that is there has to hold an
// identity, of the same control server: an empty one would let the node come
// back as a stranger, and keys of another server would be burnt here.
func openStateFile(path, controlURL string) (*stateFile, error) {
	s := &stateFile{path: path, entries: make(map[ipn.StateKey][]byte)}
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, err
		}
		return s, s.save() // shows that it can be written
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(content, &s.entries); err != nil {
		return nil, damagedState{err}
	}
	if s.entries == nil {
		return nil, damagedState{errors.New("it holds null")}
	}
	if err := s.checkControl(controlURL); err != nil {
		return nil, damagedState{err}
	}
	return s, nil
}

// damagedState is a file whose content is of no use.
type damagedState struct{ error }

func (s *stateFile) checkControl(wanted string) error {
	var prefs ipn.Prefs
	profile := s.entries[ipn.StateKey(s.entries[ipn.CurrentProfileStateKey])]
	if profile == nil || ipn.PrefsFromBytes(profile, &prefs) != nil || prefs.ControlURL == "" {
		return nil // not enrolled yet
	}
	if canonicalControl(prefs.ControlURL) != canonicalControl(wanted) {
		return fmt.Errorf("it is of a node of %s, and the control server is %s now: set that back", prefs.ControlURL, canonicalControl(wanted))
	}
	return nil
}

// canonicalControl is one of the spellings of a control server's URL.
func canonicalControl(text string) string {
	parsed, err := url.Parse(strings.TrimSuffix(text, "/"))
	if err != nil {
		return text
	}
	parsed.Host = strings.ToLower(parsed.Host)
	defaultPort := map[string]string{"http": ":80", "https": ":443"}[parsed.Scheme]
	parsed.Host = strings.TrimSuffix(parsed.Host, defaultPort)
	canonical := parsed.String()
	if canonical == "" || ipn.IsLoginServerSynonym(canonical) {
		return ipn.DefaultControlURL
	}
	return canonical
}

func (s *stateFile) ReadState(id ipn.StateKey) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	value, ok := s.entries[id]
	if !ok {
		return nil, ipn.ErrStateNotExist
	}
	return bytes.Clone(value), nil
}

// WriteState never fails: after an error Tailscale would not even try to write
// the rest of the identity, which then could not be saved later.
func (s *stateFile) WriteState(id ipn.StateKey, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if value == nil {
		delete(s.entries, id)
	} else if s.failed == nil && bytes.Equal(s.entries[id], value) {
		return nil
	} else {
		s.entries[id] = bytes.Clone(value)
	}
	s.save()
	return nil
}

// retry saves what could not be saved before.
func (s *stateFile) retry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		s.save()
	}
}

// unsaved is why the file is not up to date; nil when it is.
func (s *stateFile) unsaved() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// save replaces the file as a whole, or leaves it as it was.
func (s *stateFile) save() error {
	content, err := json.MarshalIndent(s.entries, "", "  ")
	if err == nil {
		err = atomicfile.WriteFile(s.path, content, 0o600)
	}
	s.failed = err
	return err
}
