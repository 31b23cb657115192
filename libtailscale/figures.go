package main

import (
	"runtime/debug"
	"runtime/metrics"
)

// figures is what tailscale_figures writes: the resources that Go's side of the process
// uses.
type figures struct {
	Goroutines        uint64  `json:"goroutines"`
	HeapInUseBytes    uint64  `json:"heap_in_use_bytes"`   // spans with objects in them
	HeapIdleBytes     uint64  `json:"heap_idle_bytes"`     // spans without objects, the released ones too
	HeapReleasedBytes uint64  `json:"heap_released_bytes"` // of those, given back to the system
	GCCount           int64   `json:"gc_count"`
	GCPauseSeconds    float64 `json:"gc_pause_seconds"` // all pauses together
	GOMAXPROCS        uint64  `json:"gomaxprocs"`
	Endpoints         int     `json:"endpoints"`           // of the node's stack, in whatever state
	Handles           int     `json:"handles"`             // of connections, see tailscale_conn_count
	InFlightBytes     int64   `json:"in_flight_bytes"`     // granted beyond the floors, see budget.go
	InFlightMaxBytes  int64   `json:"in_flight_max_bytes"` // what may be granted
}

// figures reads the runtime's metrics without stopping the world, which
// runtime.ReadMemStats would do: it is called with every scrape.
func (n *node) figures() figures {
	samples := []metrics.Sample{
		{Name: "/sched/goroutines:goroutines"},
		{Name: "/sched/gomaxprocs:threads"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/released:bytes"},
	}
	metrics.Read(samples)
	value := func(i int) uint64 { return samples[i].Value.Uint64() }
	var gc debug.GCStats
	debug.ReadGCStats(&gc)
	return figures{
		Goroutines:        value(0),
		GOMAXPROCS:        value(1),
		HeapInUseBytes:    value(2) + value(3),
		HeapIdleBytes:     value(4) + value(5),
		HeapReleasedBytes: value(5),
		GCCount:           gc.NumGC,
		GCPauseSeconds:    gc.PauseTotal.Seconds(),
		Endpoints:         len(n.stack.RegisteredEndpoints()),
		Handles:           conns.count(),
		InFlightBytes:     flowBudget.held.Load(),
		InFlightMaxBytes:  flowBudget.max(),
	}
}
