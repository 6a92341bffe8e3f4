package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
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
	staged   map[digest.Digest]bool  // is not visible yet
	reserved int64                   // bytes promised by the index
	written  int64                   // of them; the sum of has
	has      map[digest.Digest]int64 // bytes that are in the store, unfinished, perhaps of an earlier process
	right    map[digest.Digest]bool  // those are all bytes, and hash to the digest
}

// held is the generation of marks that no look at the pins ends.
const held = math.MaxUint64

// ErrTaken reports that another intake is under way. There is one at a time.
var ErrTaken = errors.New("another intake is under way")

// Intake begins to take in content: what manifests refer to after them. There must be
// room for all of it: otherwise it is ErrNoRoom, and nothing was evicted for it. It
// waits for fills of the same content. The caller closes it.
func (c *Cache) Intake(ctx context.Context, content []Reference) (*Intake, error) {
	in := &Intake{c: c, content: content, size: make(map[digest.Digest]int64), staged: make(map[digest.Digest]bool), has: make(map[digest.Digest]int64), right: make(map[digest.Digest]bool)}
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

// awaits tells whether dgst is to become visible with the others. It is false of no
// intake. c.mu is held.
func (in *Intake) awaits(dgst digest.Digest) bool { return in != nil && in.staged[dgst] }

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
	if c.intake != nil {
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
		if _, stored := c.index.get(dgst); stored {
			in.hold(dgst)
		} else {
			in.note(dgst, c.index.partials[dgst], false)
			c.index.removePartial(dgst)
			in.staged[dgst] = true
		}
	}
	c.intake = in
	if !c.evict(need) {
		in.end()
		return nil, fmt.Errorf("%d bytes have no room here, whatever could be evicted: %w", need, ErrNoRoom)
	}
	in.reserved = need
	c.index.reserved += need
	return nil, nil
}

// note says how many bytes of dgst are in the store, unfinished, and whether those are
// all, and right. c.mu is held.
func (in *Intake) note(dgst digest.Digest, n int64, right bool) {
	in.written += n - in.has[dgst]
	in.has[dgst], in.right[dgst] = n, right
}

// noted is note for who does not hold c.mu.
func (in *Intake) noted(dgst digest.Digest, n int64, right bool) {
	in.c.mu.Lock()
	defer in.c.mu.Unlock()
	in.note(dgst, n, right)
}

// Put takes in one piece of content. r vouches for it: it fails instead of handing out
// the last bytes of what does not hash to dgst. Content that is here already, whole and
// right, is not read from r.
func (in *Intake) Put(ctx context.Context, dgst digest.Digest, size int64, r io.Reader) error {
	done, err := in.done(dgst, size)
	if done || err != nil {
		return err
	}
	p, err := in.c.store.Begin(dgst)
	if err != nil {
		return fmt.Errorf("take in %s: %w", dgst, err)
	}
	switch whole := p.Size() == size && left(ctx, p, dgst); {
	case ctx.Err() != nil:
		err = errors.Join(context.Cause(ctx), p.Keep()) // what was left is for the next time
	case whole:
		err = p.Keep()
	default:
		in.noted(dgst, 0, false)
		err = write(ctx, p, size, r)
	}
	if err != nil {
		return fmt.Errorf("take in %s: %w", dgst, err)
	}
	in.noted(dgst, size, true)
	return nil
}

// done tells whether there is nothing to do for content that is put.
func (in *Intake) done(dgst digest.Digest, size int64) (bool, error) {
	in.c.mu.Lock()
	defer in.c.mu.Unlock()
	if want, listed := in.size[dgst]; !listed || want != size {
		return false, fmt.Errorf("take in %s of %d bytes: it was not announced", dgst, size)
	}
	_, stored := in.c.index.get(dgst)
	if !stored && !in.staged[dgst] {
		return false, fmt.Errorf("take in %s: %w", dgst, errWentAway)
	}
	return stored || in.right[dgst], nil
}

// errWentAway reports content that was stored when the intake began, and was found to be
// wrong meanwhile. There is no room promised for it: the next intake takes it in.
var errWentAway = errors.New("it was stored here and went away; begin again")

// left tells whether what an earlier process left is right.
func left(ctx context.Context, p Partial, dgst digest.Digest) bool {
	f, err := p.Open()
	if err != nil {
		return false
	}
	defer f.Close()
	got, err := hashOf(f, dgst.Algorithm(), func(int) error { return ctx.Err() })
	return err == nil && got == dgst
}

// write writes all of r, size bytes, and leaves them unfinished, or nothing.
func write(ctx context.Context, p Partial, size int64, r io.Reader) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
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

// syncers bounds the content that is made durable at a time.
const syncers = 4

// Publish makes all that was announced visible, durably: first all bytes, and then their
// names, one by one, what manifests refer to before them. Content that has not been put
// is an error, and so is content that cannot be made durable: nothing becomes visible
// then. After another error, or a crash, some of it may be visible: all of that is right.
// It can be called again; what was lost has to be put again before.
func (in *Intake) Publish(ctx context.Context) error {
	todo, err := in.todo()
	if err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(syncers)
	for _, r := range todo {
		g.Go(func() error { return in.sync(gctx, r) })
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	for _, r := range slices.Backward(todo) {
		if err := in.publish(ctx, r); err != nil {
			return fmt.Errorf("publish: %w", err)
		}
	}
	if err := in.c.store.Sync(); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	if err := in.used(); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	return nil
}

// todo is what is not visible yet, once each, in the order of the content. All of it has
// been put.
func (in *Intake) todo() ([]Reference, error) {
	c := in.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.intake != in {
		return nil, errors.New("the intake has ended")
	}
	var todo []Reference
	seen := make(map[digest.Digest]bool)
	for _, r := range in.content {
		_, stored := c.index.get(r.Digest)
		switch {
		case stored || seen[r.Digest]:
		case !in.staged[r.Digest]:
			return nil, fmt.Errorf("%s: %w", r.Digest, errWentAway)
		case !in.right[r.Digest]:
			return nil, fmt.Errorf("%s is missing", r.Digest)
		default:
			todo = append(todo, r)
		}
		seen[r.Digest] = true
	}
	return todo, nil
}

// sync makes the bytes of r survive a power cut, or gives them up.
func (in *Intake) sync(ctx context.Context, r Reference) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	p, err := in.begin(r)
	if err != nil {
		return err
	}
	if err := p.Sync(); err != nil {
		in.noted(r.Digest, 0, false)
		return errors.Join(fmt.Errorf("%s: %w", r.Digest, err), p.Discard())
	}
	return p.Keep()
}

// begin opens what was put of r.
func (in *Intake) begin(r Reference) (Partial, error) {
	p, err := in.c.store.Begin(r.Digest)
	if err == nil && p.Size() != r.Size {
		in.noted(r.Digest, 0, false)
		return nil, errors.Join(fmt.Errorf("%s has %d bytes of %d: somebody has been at it", r.Digest, p.Size(), r.Size), p.Discard())
	}
	return p, err
}

// publish makes r visible, and keeps it until the intake ends. With an error it may be
// visible nevertheless; if it is not, it is lost.
func (in *Intake) publish(ctx context.Context, r Reference) error {
	p, err := in.begin(r)
	if err != nil {
		return err
	}
	if err = p.Commit(); err != nil {
		err = fmt.Errorf("%s: %w", r.Digest, err)
	}
	c := in.c
	visible := err == nil || c.Verify(context.WithoutCancel(ctx), r.Digest) == nil // whatever it said
	if !visible {
		err = errors.Join(err, c.store.Remove(Entry{Digest: r.Digest, Partial: true}))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	in.note(r.Digest, 0, false)
	if visible {
		delete(in.staged, r.Digest)
		in.reserved -= r.Size
		c.index.release(r.Size)
		c.index.add(r.Digest, r.Size, c.now())
		in.hold(r.Digest)
	}
	return err
}

// hold keeps what is stored until the intake ends. c.mu is held.
func (in *Intake) hold(dgst digest.Digest) {
	if e, stored := in.c.index.get(dgst); stored {
		in.c.index.hold(e, firm, held)
	}
}

// used brings the content into an order in which manifests are evicted before what they
// refer to, also after a restart. All of it must be stored.
func (in *Intake) used() error {
	now := in.c.now()
	for i, r := range in.content {
		at := now.Add(time.Duration(i) * time.Microsecond)
		in.c.mu.Lock()
		e, stored := in.c.index.get(r.Digest)
		if stored {
			in.c.index.add(r.Digest, e.size, at)
			in.hold(r.Digest) // it may have gone and come again
		}
		in.c.mu.Unlock()
		if !stored {
			return fmt.Errorf("%s: %w", r.Digest, errWentAway)
		}
		in.c.touchStore(r.Digest, at)
	}
	return nil
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
	if c.intake != in {
		return
	}
	c.intake = nil
	c.index.release(in.reserved)
	for dgst := range in.size {
		if in.staged[dgst] {
			c.index.addPartial(dgst, in.has[dgst])
		} else if e, ok := c.index.get(dgst); ok && e.gen == held {
			c.index.hold(e, e.grip, c.index.gen)
		}
	}
}

// Discard ends the intake, and removes what was put and not published.
func (in *Intake) Discard() error {
	in.c.mu.Lock()
	defer in.c.mu.Unlock()
	if in.c.intake != in {
		return nil
	}
	var errs []error
	for dgst, right := range in.right {
		if !right || !in.staged[dgst] {
			continue
		}
		if err := in.c.store.Remove(Entry{Digest: dgst, Partial: true}); err != nil {
			errs = append(errs, err)
			continue
		}
		in.note(dgst, 0, false)
	}
	in.end()
	return errors.Join(errs...)
}
