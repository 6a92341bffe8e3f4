package cache

import (
	"context"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"
)

// A Manifest is held in memory whole. It is shared and not to be changed.
type Manifest struct {
	Digest digest.Digest
	Body   []byte
	Description

	touchedAt atomic.Int64 // when it and what it refers to were last touched, in Unix ns
}

func (m *Manifest) touched() time.Time     { return time.Unix(0, m.touchedAt.Load()) }
func (m *Manifest) setTouched(t time.Time) { m.touchedAt.Store(t.UnixNano()) }

const (
	maxManifest = 4 << 20   // bytes of a manifest, read into memory at once
	hotBytes    = 16 << 20  // of all manifests that are kept in memory
	hotMost     = 256 << 10 // of one of them; larger ones are rare and read from disk
)

// hotManifests are the manifests that were asked for last. What is here is
// stored too, but for a moment after its eviction.
type hotManifests struct {
	mu    sync.Mutex
	lru   *simplelru.LRU[digest.Digest, *Manifest]
	bytes int
}

func newHotManifests() *hotManifests {
	lru, err := simplelru.NewLRU[digest.Digest, *Manifest](math.MaxInt, nil)
	if err != nil {
		panic("cache: " + err.Error())
	}
	return &hotManifests{lru: lru}
}

func (h *hotManifests) get(dgst digest.Digest) *Manifest {
	h.mu.Lock()
	defer h.mu.Unlock()
	m, _ := h.lru.Get(dgst)
	return m
}

// peek is get without making it the most recently used.
func (h *hotManifests) peek(dgst digest.Digest) *Manifest {
	h.mu.Lock()
	defer h.mu.Unlock()
	m, _ := h.lru.Peek(dgst)
	return m
}

func (h *hotManifests) add(m *Manifest) {
	if len(m.Body) > hotMost {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.lru.Contains(m.Digest) {
		return
	}
	h.lru.Add(m.Digest, m)
	h.bytes += len(m.Body)
	for h.bytes > hotBytes {
		_, old, _ := h.lru.RemoveOldest()
		h.bytes -= len(old.Body)
	}
}

func (h *hotManifests) remove(dgst digest.Digest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if m, ok := h.lru.Peek(dgst); ok {
		h.bytes -= len(m.Body)
		h.lru.Remove(dgst)
	}
}

// stored returns the manifest of dgst if it is one and here, without asking a
// source.
func (c *Cache) stored(dgst digest.Digest, isManifest bool) *Manifest {
	if !isManifest {
		return nil
	}
	if m := c.hot.get(dgst); m != nil {
		return m
	}
	file, entry, err := c.store.Open(dgst)
	if err != nil {
		return nil
	}
	b := &Blob{Digest: dgst, Size: entry.Size, c: c, file: file}
	defer b.Close()
	m, err := c.read(context.Background(), b)
	if err != nil {
		return nil // what it refers to cannot be touched then
	}
	return m
}
