package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"tailscale.com/atomicfile"
	"tailscale.com/ipn"
)

// stateFile is the file of the node's identity, in the format of Tailscale's own store
// (ipn/store.FileStore). Tailscale's store forgets that a write has failed: the backend
// logs it and goes on, and from then on the same content counts as saved. This store
// remembers the failure and tries again.
type stateFile struct {
	path string

	mu      sync.Mutex
	entries map[ipn.StateKey][]byte
	failed  error // of the last attempt to save; nil when the file is up to date
}

// openStateFile reads the file, or makes it. An existing file has to contain an
// identity: with an empty one the node would come back as a new node.
func openStateFile(path string) (*stateFile, error) {
	s := &stateFile{path: path, entries: make(map[ipn.StateKey][]byte)}
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, err
		}
		return s, s.save() // shows that the file can be written
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
	return s, nil
}

// damagedState is a file whose content is not usable.
type damagedState struct{ error }

func (s *stateFile) ReadState(id ipn.StateKey) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	value, ok := s.entries[id]
	if !ok {
		return nil, ipn.ErrStateNotExist
	}
	return bytes.Clone(value), nil
}

// WriteState never fails: after an error Tailscale would not try to write the rest of
// the identity, so it could not be saved later.
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
