package cache

import (
	"context"
	"slices"
)

// prefetchMost bounds the prefetches that run at once, prefetchQueue those that
// wait. An image has a config and rarely more than twenty layers; clients fetch
// three at a time.
const (
	prefetchMost  = 8
	prefetchQueue = 256
)

// A prefetch is a fill that has not begun, for content that a client is about
// to ask for.
type prefetch struct {
	ref Reference
	src Source
}

// Prefetch begins to fill what m refers to before it is asked for, a bounded
// number at a time. src returns where a reference comes from. A fill that
// nobody joins is given up like one that everybody left.
func (c *Cache) Prefetch(m *Manifest, src func(Reference) Source) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing || !c.index.ready {
		return // not worth a look on disk for each layer
	}
	for _, r := range m.Refers {
		queued := func(p prefetch) bool { return p.ref.Digest == r.Digest }
		if c.wanted(r) && len(c.queue) < prefetchQueue && !slices.ContainsFunc(c.queue, queued) {
			c.queue = append(c.queue, prefetch{r, src(r)})
		}
	}
	c.prefetchNext()
}

// wanted tells whether r is neither here nor arriving. c.mu is held.
func (c *Cache) wanted(r Reference) bool {
	_, here := c.index.get(r.Digest)
	return !here && c.fills[r.Digest] == nil && !c.intake.awaits(r.Digest)
}

// prefetchNext begins what there is a place for. c.mu is held.
func (c *Cache) prefetchNext() {
	for len(c.queue) > 0 && c.ahead < prefetchMost && !c.closing {
		next := c.queue[0]
		c.queue = c.queue[1:]
		if c.wanted(next.ref) {
			f := c.begin(context.Background(), next.ref.Digest, next.src)
			f.ahead = true
			c.ahead++
		}
	}
}
