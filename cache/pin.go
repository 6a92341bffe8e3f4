package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Pin keeps content, and everything it refers to that is here, from being
// evicted: firmly, or as long as there is anything else to evict.
type Pin struct {
	Digest digest.Digest
	Firm   bool

	// Children are the manifests of an index that are kept with it; nil is all.
	Children map[digest.Digest]bool
}

// A grip is how firmly content is kept. It is what evict goes by.
type grip uint8

const (
	loose grip = iota
	soft       // pinned while there is room
	firm       // pinned
)

// repinEvery is how often the pins are looked at anew when something changed.
// Until then what became pinned by Keep is kept, and what is pinned no longer is
// kept a while longer.
const repinEvery = 5 * time.Minute

// Keep pins dgst, and everything it refers to that is here, from now on, ahead
// of the next look at Options.Pins, which must tell of it too.
func (c *Cache) Keep(dgst digest.Digest, firmly bool) {
	c.mu.Lock()
	gen := c.index.gen + 1 // a look that is under way has not heard of it
	c.mu.Unlock()
	c.mark(Pin{Digest: dgst, Firm: firmly}, gen, make(map[digest.Digest]bool))
	c.Repin()
}

// Repin has the pins looked at anew soon.
func (c *Cache) Repin() {
	select {
	case c.repin <- struct{}{}:
	default:
	}
}

// runPins looks at the pins whenever something changed, until ctx ends.
func (c *Cache) runPins(ctx context.Context) {
	if c.pins == nil {
		<-ctx.Done()
		return
	}
	for {
		select {
		case <-c.repin:
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(repinEvery):
		case <-ctx.Done():
			return
		}
		c.LookAtPins(ctx)
	}
}

// LookAtPins looks at the pins anew, now. It returns whether it could.
func (c *Cache) LookAtPins(ctx context.Context) bool {
	c.pinning.Lock()
	defer c.pinning.Unlock()
	return c.pinAll(ctx)
}

// pinAll marks everything that is pinned. Until that has succeeded once,
// nothing is evicted. What arrives between two looks is kept softly until the
// next one: it may belong to what is pinned, and is being pulled just now.
func (c *Cache) pinAll(ctx context.Context) bool {
	c.mu.Lock()
	c.index.gen += 2 // what Keep marked before is told of by now, or let go
	gen := c.index.gen
	if c.pins != nil {
		c.index.fresh = soft
	}
	c.mu.Unlock()
	if c.pins != nil {
		for p, err := range c.pins(ctx) {
			if err != nil {
				if ctx.Err() == nil {
					c.log.Error().Err(err).Msg("what is to be kept is unknown; nothing that was pinned is let go, and it is tried again")
				}
				c.Repin()
				return false
			}
			c.mark(p, gen, make(map[digest.Digest]bool))
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, dgst := range c.index.lru.Keys() {
		if e, _ := c.index.get(dgst); e.gen < gen {
			c.index.hold(e, loose, e.gen)
		}
	}
	c.index.pinned = true
	return true
}

// mark pins what p tells of and everything below it, in a generation. seen are
// the manifests that were looked into already: an index can name one many times.
func (c *Cache) mark(p Pin, gen uint64, seen map[digest.Digest]bool) {
	g := soft
	if p.Firm {
		g = firm
	}
	if seen[p.Digest] || !c.markOne(p.Digest, g, gen) {
		return
	}
	seen[p.Digest] = true
	d, err := c.describeStored(p.Digest)
	if err != nil {
		return // it is no manifest: there is nothing below it
	}
	for _, r := range d.Refers {
		switch {
		case !d.Index:
			c.markOne(r.Digest, g, gen)
		case p.Children == nil || p.Children[r.Digest]:
			c.mark(Pin{Digest: r.Digest, Firm: p.Firm}, gen, seen)
		}
	}
}

// markOne marks one entry, and tells whether there is one.
func (c *Cache) markOne(dgst digest.Digest, g grip, gen uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, here := c.index.get(dgst)
	switch {
	case !here:
	case e.gen < gen:
		c.index.hold(e, g, gen)
	default:
		c.index.hold(e, max(e.grip, g), e.gen)
	}
	return here
}

// describeStored reads what a stored manifest says, past those held in memory,
// which are there for clients.
func (c *Cache) describeStored(dgst digest.Digest) (Description, error) {
	if m := c.hot.peek(dgst); m != nil {
		return m.Description, nil
	}
	file, entry, err := c.store.Open(dgst)
	if err != nil {
		return Description{}, err
	}
	defer file.Close()
	if entry.Size > maxManifest {
		return Description{}, ErrNotManifest
	}
	body, err := io.ReadAll(file)
	if err != nil {
		return Description{}, err
	}
	return c.describe(body)
}

// ErrNoRoom reports content that cannot be kept.
var ErrNoRoom = errUncached

// Ensure has dgst here, from src if it is not, and returns when it is stored.
func (c *Cache) Ensure(ctx context.Context, dgst digest.Digest, src Source) error {
	b, err := c.Get(ctx, dgst, src)
	if err != nil {
		return err
	}
	defer b.Close()
	switch b.Outcome {
	case Hit:
		return nil
	case Pass:
		return fmt.Errorf("keep %s of %d bytes: %w", dgst, b.Size, ErrNoRoom)
	}
	s, err := b.Section(ctx, 0, -1)
	if err != nil {
		return err
	}
	if _, err := s.WriteTo(io.Discard); err != nil {
		return err
	}
	if b.Outcome == Pass {
		return fmt.Errorf("keep %s: %w", dgst, ErrNoRoom)
	}
	select {
	case <-b.fill.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if _, here := c.Stat(dgst); !here {
		return fmt.Errorf("keep %s: it was fetched and could not be stored", dgst)
	}
	return nil
}

// Read returns the content of dgst whole, up to limit bytes, from src if it is
// not here. A nil src looks no further than here, and absent content is then an
// error.
func (c *Cache) Read(ctx context.Context, dgst digest.Digest, src Source, limit int64) ([]byte, error) {
	if m := c.hot.peek(dgst); m != nil {
		return m.Body, nil
	}
	if src == nil {
		if _, here := c.Stat(dgst); !here {
			return nil, errAbsent
		}
		src = absent{}
	}
	b, err := c.Get(ctx, dgst, src)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	body, err := b.readAll(ctx, limit)
	if err == nil && b.Outcome == Hit && b.Digest.Algorithm().FromBytes(body) != dgst {
		c.drop(dgst, "stored content does not match its digest")
		return nil, fmt.Errorf("stored content %s: %w", dgst, ErrMismatch)
	}
	return body, err
}

var errAbsent = errors.New("content is not here")

// absent is the source of content that is nowhere else.
type absent struct{}

func (absent) Name() string { return "nowhere" }
func (absent) Open(context.Context, int64, int64) (*Content, error) {
	return nil, errAbsent
}

// A Presence says how much of an image is here.
type Presence string

// The presences. Of an index, an image of it that is here whole is enough.
const (
	Here Presence = "here"
	Torn Presence = "partial"
	Gone Presence = "gone"
)

// Presence tells how much of what dgst refers to is here.
func (c *Cache) Presence(dgst digest.Digest) Presence {
	if _, here := c.Stat(dgst); !here {
		return Gone
	}
	d, err := c.describeStored(dgst)
	if err != nil {
		return Here // nothing that refers to more
	}
	for _, r := range d.Refers {
		switch _, here := c.Stat(r.Digest); {
		case d.Index && here && c.Presence(r.Digest) == Here:
			return Here
		case !d.Index && !here:
			return Torn
		}
	}
	if d.Index && len(d.Refers) > 0 {
		return Torn
	}
	return Here
}
