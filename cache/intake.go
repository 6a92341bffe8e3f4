package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// An Intake takes in content that comes together and is to become visible together,
// when all of it was found to be right. Until then it is unfinished content, which
// nobody sees; after a crash it is there for the next intake of the same. Content that
// is stored already, and what Publish stores, is kept until Close.
type Intake struct {
	c       *Cache
	content []Reference
	size    map[digest.Digest]int64

	// Guarded by c.mu.
	reserved int64                  // bytes promised by the index
	written  int64                  // of them
	here     map[digest.Digest]bool // all bytes are in the store, unfinished
}

// held is the generation of marks that no look at the pins ends.
const held = math.MaxUint64

// ErrTaken reports that another intake is under way. There is one at a time.
var ErrTaken = errors.New("another intake is under way")

// Intake begins to take in content: what manifests refer to after them. There must be
// room for all of it: otherwise it is ErrNoRoom, and nothing was evicted for it. It
// waits for fills of the same content. The caller closes it.
func (c *Cache) Intake(ctx context.Context, content []Reference) (*Intake, error) {
	in := &Intake{c: c, content: content, size: make(map[digest.Digest]int64), here: make(map[digest.Digest]bool)}
	for _, r := range content {
		in.size[r.Digest] = r.Size
	}
	for {
		f, err := c.beginIntake(in)
		if err != nil || f == nil {
			return in, err
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// beginIntake takes room for in, or returns a fill that has to end before that.
func (c *Cache) beginIntake(in *Intake) (*fill, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing {
		return nil, ErrClosing
	}
	if !c.index.ready || !c.index.pinned {
		return nil, ErrNotReady
	}
	if len(c.intakes) > 0 {
		return nil, ErrTaken
	}
	var need, here int64
	for dgst, size := range in.size {
		switch e, stored := c.index.get(dgst); {
		case stored && e.grip < firm:
			here += size
		case stored:
		case c.fills[dgst] != nil:
			return c.fills[dgst], nil
		default:
			need += size
		}
	}
	if pinned := c.index.sizes[firm]; pinned+need+here > c.maxBytes {
		return nil, fmt.Errorf("%d bytes, with %d that are pinned already, are more than the %d that the cache may have: %w", need+here, pinned, c.maxBytes, ErrNoRoom)
	}
	for dgst := range in.size {
		if e, stored := c.index.get(dgst); stored {
			c.index.hold(e, firm, held)
		} else {
			c.index.removePartial(dgst)
			c.staged[dgst] = in
		}
	}
	c.intakes[in] = true
	if !c.evict(need) {
		in.end()
		return nil, fmt.Errorf("%d bytes have no room here, whatever could be evicted: %w", need, ErrNoRoom)
	}
	in.reserved = need
	c.index.reserved += need
	return nil, nil
}

// Put takes in one piece of content. r vouches for it: it fails instead of handing out
// the last bytes of what does not hash to dgst. Content that is here already, whole and
// right, is not read from r.
func (in *Intake) Put(ctx context.Context, dgst digest.Digest, size int64, r io.Reader) error {
	in.c.mu.Lock()
	want, listed := in.size[dgst]
	done := in.here[dgst] || in.c.staged[dgst] != in
	in.c.mu.Unlock()
	if !listed || want != size {
		return fmt.Errorf("take in %s of %d bytes: it was not announced", dgst, size)
	}
	if done {
		return nil
	}
	p, err := in.c.store.Begin(dgst)
	if err != nil {
		return fmt.Errorf("take in %s: %w", dgst, err)
	}
	if p.Size() == size && left(ctx, p, dgst) {
		err = p.Keep()
	} else {
		err = write(ctx, p, size, r)
	}
	if err != nil {
		return fmt.Errorf("take in %s: %w", dgst, err)
	}
	in.c.mu.Lock()
	defer in.c.mu.Unlock()
	in.here[dgst] = true
	in.written += size
	return nil
}

// left tells whether what an earlier process left is right.
func left(ctx context.Context, p Partial, dgst digest.Digest) bool {
	f, err := p.Open()
	if err != nil {
		return false
	}
	defer f.Close()
	digester, buf := dgst.Algorithm().Digester(), make([]byte, verifyPiece)
	for ctx.Err() == nil {
		n, err := f.Read(buf)
		digester.Hash().Write(buf[:n])
		if err != nil {
			return err == io.EOF && digester.Digest() == dgst
		}
	}
	return false
}

// pieces are what content is written in.
var pieces = sync.Pool{New: func() any { b := make([]byte, 1<<20); return &b }}

// write writes all of r, size bytes, and leaves them unfinished, or nothing.
func write(ctx context.Context, p Partial, size int64, r io.Reader) error {
	buf := pieces.Get().(*[]byte)
	defer pieces.Put(buf)
	err := p.Reset()
	for n := int64(0); err == nil && n < size; {
		var got int
		got, err = io.ReadFull(r, (*buf)[:min(size-n, int64(len(*buf)))])
		if n += int64(got); err != nil {
			err = fmt.Errorf("after %d of %d bytes: %w", n, size, err)
			break
		}
		if _, err = p.Write((*buf)[:got]); err == nil {
			err = ctx.Err()
		}
	}
	if err != nil {
		return errors.Join(err, p.Discard())
	}
	return p.Keep()
}

// publishers bounds the content that is made durable at a time.
const publishers = 4

// Publish makes all that was announced visible, durably, what manifests refer to before
// them. Content that has not been put is an error, and nothing becomes visible. After
// another error some of it may be visible: all of that is right. It can be called again.
func (in *Intake) Publish(ctx context.Context) error {
	in.c.mu.Lock()
	var todo []Reference
	for _, r := range in.content {
		switch {
		case in.c.staged[r.Digest] != in: // it is stored
		case !in.here[r.Digest]:
			in.c.mu.Unlock()
			return fmt.Errorf("publish: %s is missing", r.Digest)
		default:
			todo = append(todo, r)
		}
	}
	in.c.mu.Unlock()
	slices.Reverse(todo)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(publishers)
	seen := make(map[digest.Digest]bool)
	for _, r := range todo {
		if seen[r.Digest] {
			continue
		}
		seen[r.Digest] = true
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			return in.publish(r)
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	in.used()
	return nil
}

func (in *Intake) publish(r Reference) error {
	p, err := in.c.store.Begin(r.Digest)
	if err != nil {
		return err
	}
	if p.Size() != r.Size {
		return errors.Join(fmt.Errorf("%s has %d bytes of %d: somebody has been at it", r.Digest, p.Size(), r.Size), p.Discard())
	}
	if err := p.Commit(); err != nil {
		return fmt.Errorf("%s: %w", r.Digest, err)
	}
	in.c.mu.Lock()
	defer in.c.mu.Unlock()
	delete(in.c.staged, r.Digest)
	in.reserved, in.written = in.reserved-r.Size, in.written-r.Size
	in.c.index.release(r.Size)
	in.c.index.add(r.Digest, r.Size, in.c.now())
	if e, ok := in.c.index.get(r.Digest); ok {
		in.c.index.hold(e, firm, held)
	}
	return nil
}

// used brings what was published into an order in which manifests are evicted before
// what they refer to, also after a restart.
func (in *Intake) used() {
	now := in.c.now()
	for i, r := range in.content {
		at := now.Add(time.Duration(i) * time.Microsecond)
		in.c.mu.Lock()
		e, ok := in.c.index.get(r.Digest)
		if ok {
			in.c.index.add(r.Digest, e.size, at)
		}
		in.c.mu.Unlock()
		in.c.touchStore(r.Digest, at)
	}
}

// Close ends the intake. What was put and not published stays unfinished, for the next
// time. What is stored is kept only as the pins say from here on.
func (in *Intake) Close() {
	in.c.mu.Lock()
	in.end()
	in.c.mu.Unlock()
	in.c.Repin()
}

// end gives back what in has taken. c.mu is held.
func (in *Intake) end() {
	c := in.c
	if !c.intakes[in] {
		return
	}
	delete(c.intakes, in)
	c.index.release(in.reserved)
	for dgst, size := range in.size {
		if c.staged[dgst] == in {
			delete(c.staged, dgst)
			if in.here[dgst] {
				c.index.addPartial(dgst, size)
			}
		} else if e, ok := c.index.get(dgst); ok && e.gen == held {
			c.index.hold(e, e.grip, c.index.gen)
		}
	}
}

// Discard ends the intake, and removes what was put and not published.
func (in *Intake) Discard() error {
	in.c.mu.Lock()
	defer in.c.mu.Unlock()
	if !in.c.intakes[in] {
		return nil
	}
	var errs []error
	for dgst := range in.here {
		if in.c.staged[dgst] == in {
			errs = append(errs, in.c.store.Remove(Entry{Digest: dgst, Partial: true}))
			delete(in.here, dgst)
		}
	}
	in.end()
	return errors.Join(errs...)
}
