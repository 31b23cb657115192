package main

import "sync"

// table maps handles to objects. A handle contains the generation of its slot, so an
// old handle never names the object that uses the slot later. The zero handle is never
// given out.
//
// It holds connections and listeners, and knows nothing of them.
type table[T any] struct {
	mu    sync.RWMutex
	slots []slot[T]
	free  []uint32
}

type slot[T any] struct {
	generation uint32 // of the object in it, or of the next one
	object     *T     // nil when free
}

// add stores object and returns its handle.
func (t *table[T]) add(object *T) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	var i uint32
	if n := len(t.free); n > 0 {
		i, t.free = t.free[n-1], t.free[:n-1]
	} else {
		i = uint32(len(t.slots))
		t.slots = append(t.slots, slot[T]{generation: 1})
	}
	t.slots[i].object = object
	return uint64(t.slots[i].generation)<<32 | uint64(i)
}

// get returns the object of a handle, or nil.
func (t *table[T]) get(handle uint64) *T {
	i, generation := uint32(handle), uint32(handle>>32)
	t.mu.RLock()
	defer t.mu.RUnlock()
	if int(i) >= len(t.slots) || t.slots[i].generation != generation {
		return nil
	}
	return t.slots[i].object
}

// remove takes the object of a handle out and returns it, or nil.
func (t *table[T]) remove(handle uint64) *T {
	i, generation := uint32(handle), uint32(handle>>32)
	t.mu.Lock()
	defer t.mu.Unlock()
	if int(i) >= len(t.slots) || t.slots[i].generation != generation {
		return nil
	}
	s := &t.slots[i]
	object := s.object
	if object == nil {
		return nil
	}
	s.object = nil
	s.generation++
	if s.generation == 0 { // wrapped: zero would make handle 0 valid
		s.generation = 1
	}
	t.free = append(t.free, i)
	return object
}

// each calls f with every object.
func (t *table[T]) each(f func(*T)) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for i := range t.slots {
		if object := t.slots[i].object; object != nil {
			f(object)
		}
	}
}

// count returns how many objects the table holds.
func (t *table[T]) count() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.slots) - len(t.free)
}
