// Package cache answers one question: where are the bytes of this digest?
// They are stored, or arriving, or asked for, once, from a source.
package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"
)

// ErrMismatch reports content whose bytes do not hash to the digest they were
// asked for under. Nothing is stored when a fill ends with it.
var ErrMismatch = errors.New("content does not match its digest")

// ErrNotManifest reports content that was asked for as a manifest and is none.
var ErrNotManifest = errors.New("content is not a manifest")

// ErrRange is what a Source returns when the content ends before the bytes it
// was asked for. The caller may ask from the beginning.
var ErrRange = errors.New("content ends before the range")

// A Source opens one piece of content where it comes from, usually an upstream
// registry. It is asked once for everybody who waits for the content, and again
// only to resume.
type Source interface {
	// Open opens the content from byte off on; n bytes of it, or all when n is
	// -1. A source that cannot begin at off begins at 0 and says so. ctx bounds
	// the reading too.
	Open(ctx context.Context, off, n int64) (*Content, error)

	// Name says where the content comes from: sources of the same name give the
	// same answer.
	Name() string
}

// A Verified is a Source that is told when all of what it opened was right. It is
// asked even if an earlier fill has left all bytes behind.
type Verified interface{ Verified() }

// Content is what a Source opened.
type Content struct {
	Body   io.ReadCloser
	Offset int64 // where Body begins: what was asked for, or 0
	Size   int64 // of the whole content in bytes, -1 when not known
}

// A Description is what a manifest says about itself and other content.
type Description struct {
	MediaType string
	Index     bool // Refers are manifests themselves
	Refers    []Reference
}

// A Reference names content that a manifest needs. Size is -1 when not known.
type Reference struct {
	Digest digest.Digest
	Size   int64
}

// Options configure a Cache. Store, Describe and Budget are required.
type Options struct {
	Store Store

	// Budget bounds the content stored and arriving, in bytes. It is called with
	// what is stored once that is known, and with 0 before.
	Budget func(stored int64) int64

	// MinFree is the space in bytes that is left to others on the file system.
	MinFree int64

	// Describe reads a manifest. It is a function, because what manifests look
	// like is not this package's business.
	Describe func(manifest []byte) (Description, error)

	// Pins tells of all content that is to be kept, the firm pins first. It is asked
	// after the start and when Repin was called. Nil pins nothing.
	Pins func(context.Context) iter.Seq2[Pin, error]

	// Grace is how long a fill goes on when nobody reads it any more. Default
	// one minute: a client that comes back after a hiccup, or the next machine
	// of the same rollout, should find it further along, not gone.
	Grace time.Duration

	// Now is the clock. Default time.Now.
	Now func() time.Time

	Log zerolog.Logger
}

// A Cache keeps content within bounds, and fetches each piece once however many
// ask for it. Create it with New; call Run, once, to let it find what its store
// holds and to stop the fills in the end.
type Cache struct {
	store    Store
	describe func([]byte) (Description, error)
	budget   func(int64) int64
	minFree  int64
	pins     func(context.Context) iter.Seq2[Pin, error]
	repin    chan struct{} // holds one wake-up
	grace    time.Duration
	now      func() time.Time
	log      zerolog.Logger

	wg sync.WaitGroup // fills; Run waits for them

	pinning sync.Mutex // one look at the pins at a time

	mu       sync.Mutex
	index    *index
	fills    map[digest.Digest]*fill // at most one for each digest
	queue    []prefetch              // waiting for a place among the prefetches
	ahead    int                     // prefetches that run
	closing  bool                    // no fill may start any more
	intake   *Intake                 // that is under way, nil if none is
	maxBytes int64                   // what budget said last

	hot *hotManifests

	hits, misses, saved, evicted atomic.Int64
	failures                     failureCounts
}

// New returns a cache of what o.Store holds. It starts nothing.
func New(o Options) *Cache {
	c := &Cache{
		store:    o.Store,
		describe: o.Describe,
		budget:   o.Budget,
		maxBytes: o.Budget(0),
		minFree:  o.MinFree,
		pins:     o.Pins,
		repin:    make(chan struct{}, 1),
		grace:    o.Grace,
		now:      o.Now,
		log:      o.Log,
		index:    newIndex(),
		fills:    make(map[digest.Digest]*fill),
		hot:      newHotManifests(),
	}
	if c.grace == 0 {
		c.grace = time.Minute
	}
	if c.now == nil {
		c.now = time.Now
	}
	return c
}

// Run finds what the store holds, while requests are already served, and then
// waits for ctx to end. It returns when no fill runs any more; what they have
// got is kept for the next process.
func (c *Cache) Run(ctx context.Context) error {
	if err := c.rebuild(ctx); err != nil && ctx.Err() == nil {
		// Served as promised, but unbounded: the operator must know.
		c.log.Error().Err(err).Msg("cache index is incomplete; content that was not found is fetched again and not evicted")
	}
	c.LookAtPins(ctx)
	c.mu.Lock()
	c.evict(0)
	c.mu.Unlock()
	c.runPins(ctx)
	c.mu.Lock()
	c.closing, c.queue = true, nil
	for _, f := range c.fills {
		f.cancel(ErrClosing)
	}
	c.mu.Unlock()
	c.wg.Wait()
	return nil
}

// An Outcome says where the bytes of an answer came from.
type Outcome int

const (
	Hit  Outcome = iota // they were here
	Fill                // this request began the fill
	Join                // someone else's fill was under way
	Pass                // straight from the source, nothing is kept
)

// String is the outcome as logs and metrics name it.
func (o Outcome) String() string { return [...]string{"hit", "fill", "join", "pass"}[o] }

// Get returns the content of dgst, from src when it is not here. It returns as
// soon as the content's size is known, with the source's error if there is none
// to be had. The caller closes the blob.
func (c *Cache) Get(ctx context.Context, dgst digest.Digest, src Source) (*Blob, error) {
	retried := false
	for {
		b, f, started, err := c.openOrFill(ctx, dgst, src)
		if errors.Is(err, errUncached) {
			c.misses.Add(1)
			return c.pass(ctx, dgst, src)
		}
		if err != nil {
			return nil, err
		}
		if b != nil {
			c.hits.Add(1)
			return b, nil
		}
		if !retried {
			c.misses.Add(1)
		}
		err = f.opening(ctx)
		switch {
		case err == nil:
			outcome := Join
			if started {
				outcome = Fill
			}
			return &Blob{Digest: dgst, Size: f.size, Outcome: outcome, c: c, fill: f, src: src}, nil
		case errors.Is(err, errUncached):
			c.leave(f)
			return c.pass(ctx, dgst, src)
		case !started && !retried && f.src.Name() != src.Name() && ctx.Err() == nil:
			// Somebody else's source had no answer; ours may.
			c.leave(f)
			retried = true
		default:
			c.leave(f)
			return nil, err
		}
	}
}

// Stat tells the size of dgst if its bytes are here or arriving, without
// asking anyone.
func (c *Cache) Stat(dgst digest.Digest) (size int64, ok bool) {
	if size, ok := c.Holds(dgst); ok {
		return size, true
	}
	c.mu.Lock()
	f := c.fills[dgst]
	c.mu.Unlock()
	if f != nil && f.isOpen() && f.size >= 0 {
		return f.size, true
	}
	return 0, false
}

// openOrFill returns the stored content, or a fill that the caller must leave.
func (c *Cache) openOrFill(ctx context.Context, dgst digest.Digest, src Source) (b *Blob, f *fill, started bool, err error) {
	looked := false // whether the store has just said that it is absent
	for {
		c.mu.Lock()
		if f := c.fills[dgst]; f != nil && !f.dying {
			f.enter()
			c.mu.Unlock()
			return nil, f, false, nil
		} else if f != nil {
			c.mu.Unlock()
			select {
			case <-f.done:
				continue
			case <-ctx.Done():
				return nil, nil, false, context.Cause(ctx)
			}
		}
		_, indexed := c.index.get(dgst)
		if !indexed && (c.index.ready || looked) {
			if c.closing {
				c.mu.Unlock()
				return nil, nil, false, fmt.Errorf("fill %s: %w", dgst, ErrClosing)
			}
			if c.intake.awaits(dgst) {
				c.mu.Unlock()
				return nil, nil, false, fmt.Errorf("fill %s, which an intake is about to store: %w", dgst, errUncached)
			}
			f = c.begin(ctx, dgst, src)
			f.enter()
			c.mu.Unlock()
			return nil, f, true, nil
		}
		c.mu.Unlock()

		file, entry, err := c.store.Open(dgst)
		switch {
		case err == nil && c.truncated(dgst, entry):
			// Not what was committed: the disk or somebody has been at it.
			file.Close()
			c.drop(dgst, "stored content has another size than it had")
			looked = true
			continue
		case err == nil:
			c.used(dgst, entry)
			return &Blob{Digest: dgst, Size: entry.Size, Outcome: Hit, c: c, file: file}, nil, false, nil
		case !errors.Is(err, fs.ErrNotExist):
			return nil, nil, false, fmt.Errorf("open %s: %w", dgst, err)
		}
		c.forget(dgst) // somebody removed the file
		looked = true
	}
}

// Manifest returns the manifest of dgst whole. Its bytes were verified, and are
// stored unless there is no room. Those that are asked for often are answered
// without a system call.
func (c *Cache) Manifest(ctx context.Context, dgst digest.Digest, src Source) (*Manifest, Outcome, error) {
	if m := c.hot.get(dgst); m != nil {
		c.hits.Add(1)
		c.touchManifest(m)
		return m, Hit, nil
	}
	b, err := c.Get(ctx, dgst, src)
	if err != nil {
		return nil, 0, err
	}
	m, err := c.read(ctx, b)
	if errors.Is(err, ErrMismatch) && b.file != nil {
		// What was stored has rotted, and is gone now.
		b.Close()
		if b, err = c.Get(ctx, dgst, src); err != nil {
			return nil, 0, err
		}
		m, err = c.read(ctx, b)
	}
	defer b.Close()
	if err != nil {
		return nil, b.Outcome, err
	}
	if b.fill != nil {
		// A manifest is small enough to wait until it is stored: then its place in
		// the order of use is certain, and whoever goes by it finds it after a crash.
		select {
		case <-b.fill.done:
		case <-ctx.Done():
			return nil, b.Outcome, context.Cause(ctx)
		}
	}
	c.touchManifest(m)
	return m, b.Outcome, nil
}

// read holds a manifest in memory.
func (c *Cache) read(ctx context.Context, b *Blob) (*Manifest, error) {
	body, err := b.readAll(ctx, maxManifest)
	if err != nil {
		return nil, err
	}
	m := &Manifest{Digest: b.Digest, Body: body}
	if b.file != nil && b.Digest.Algorithm().FromBytes(body) != b.Digest {
		c.drop(b.Digest, "stored manifest does not match its digest")
		return nil, fmt.Errorf("stored manifest %s: %w", b.Digest, ErrMismatch)
	}
	if m.Description, err = c.describe(body); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", b.Digest, ErrNotManifest, err)
	}
	c.hot.add(m)
	return m, nil
}

// Stats is what a cache tells about itself.
type Stats struct {
	Ready        bool // the index is complete, and what is pinned is known
	Bytes, Blobs int64
	PinnedBytes  int64 // of them, firmly
	Budget       int64
	Hits, Misses int64
	SavedBytes   int64 // sent to clients without asking a source for them
	EvictedBytes int64
	Oldest       time.Time // last use of what would be evicted next, zero if there is nothing
	Fills        []FillStats
	Failures     map[string]int64 // fills that failed, by reason
}

// FillStats tells how far a fill is.
type FillStats struct {
	Digest  digest.Digest
	Size    int64 // -1 when not known
	Have    int64
	Readers int
}

// Stats returns the present figures.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Stats{
		Ready: c.index.ready && c.index.pinned, Bytes: c.index.bytes, Blobs: int64(c.index.lru.Len()), Budget: c.maxBytes,
		PinnedBytes: c.index.sizes[firm],
		Hits:        c.hits.Load(), Misses: c.misses.Load(), SavedBytes: c.saved.Load(), EvictedBytes: c.evicted.Load(),
		Failures: c.failures.snapshot(),
	}
	if _, e, ok := c.index.lru.GetOldest(); ok {
		s.Oldest = e.used
	}
	for _, f := range c.fills {
		s.Fills = append(s.Fills, f.stats())
	}
	return s
}

// failureCounts counts failed fills by reason.
type failureCounts struct {
	mu sync.Mutex
	m  map[string]int64
}

func (f *failureCounts) add(reason string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.m == nil {
		f.m = make(map[string]int64)
	}
	f.m[reason]++
}

func (f *failureCounts) snapshot() map[string]int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make(map[string]int64, len(f.m))
	for k, v := range f.m {
		out[k] = v
	}
	return out
}
