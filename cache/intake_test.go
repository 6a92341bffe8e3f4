package cache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/cache"
)

// parcel is content that comes together: an image's manifest, then its layers.
func (i image) parcel() (bodies [][]byte, content []cache.Reference) {
	bodies = append([][]byte{i.manifest}, i.layers...)
	for _, b := range bodies {
		content = append(content, cache.Reference{Digest: digest.FromBytes(b), Size: int64(len(b))})
	}
	return bodies, content
}

func intake(t *testing.T, c *cache.Cache, content []cache.Reference) *cache.Intake {
	t.Helper()
	in, err := c.Intake(t.Context(), content)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func put(t *testing.T, in *cache.Intake, body []byte) {
	t.Helper()
	if err := in.Put(t.Context(), digest.FromBytes(body), int64(len(body)), bytes.NewReader(body)); err != nil {
		t.Fatal(err)
	}
}

// partials are the names of what is unfinished.
func partials(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := os.ReadDir(filepath.Join(dir, "partial"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		names = append(names, f.Name())
	}
	return names
}

// What comes together becomes visible together: nothing of it before, all of it after,
// also for the next process.
func TestAnIntakeBecomesVisibleTogether(t *testing.T) {
	c, dir := start(t, options{})
	img := newImage(1000, 2000)
	bodies, content := img.parcel()
	in := intake(t, c, content)
	for i, b := range bodies {
		if err := in.Publish(t.Context()); err == nil {
			t.Fatal("it was published before all of it had come")
		}
		for _, b := range bodies[:i] {
			if _, held := c.Holds(digest.FromBytes(b)); held || here(c, b) {
				t.Fatal("content is visible before it is published")
			}
		}
		put(t, in, b)
		nothingWrong(t, c, dir)
	}
	if err := in.Publish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := in.Publish(t.Context()); err != nil {
		t.Errorf("published again: %v", err)
	}
	if !img.whole(c) || len(partials(t, dir)) != 0 {
		t.Errorf("after that it is not whole, or %v is left", partials(t, dir))
	}
	in.Close()
	nothingWrong(t, c, dir)
	again, _ := start(t, options{dir: dir})
	if !img.whole(again) {
		t.Error("the next process does not have all of it")
	}
}

// What an intake that ended has got is there for the next of the same: it is not read
// again. What of it is not right is.
func TestAnIntakeGoesOnWhereTheLastOneEnded(t *testing.T) {
	dir := t.TempDir()
	img := newImage(1000, 2000, 3000)
	bodies, content := img.parcel()
	t.Run("killed", func(t *testing.T) {
		c, _ := start(t, options{dir: dir})
		in := intake(t, c, content)
		for _, b := range bodies[:3] {
			put(t, in, b)
		}
		// Neither closed nor published: as after kill -9.
	})
	path := filepath.Join(dir, "partial", "sha256-"+digest.FromBytes(bodies[1]).Encoded())
	if err := os.WriteFile(path, make([]byte, len(bodies[1])), 0o644); err != nil { // lost by a power cut
		t.Fatal(err)
	}
	c, _ := start(t, options{dir: dir})
	in := intake(t, c, content)
	defer in.Close()
	for i, b := range bodies {
		r := &unread{r: bytes.NewReader(b)}
		if err := in.Put(t.Context(), digest.FromBytes(b), int64(len(b)), r); err != nil {
			t.Fatal(err)
		}
		if want := i == 1 || i == 3; (r.n > 0) != want {
			t.Errorf("of piece %d %d bytes were read", i, r.n)
		}
	}
	if err := in.Publish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !img.whole(c) {
		t.Error("it is not whole")
	}
	nothingWrong(t, c, dir)
}

// unread counts what is read of it.
type unread struct {
	r io.Reader
	n int
}

func (u *unread) Read(p []byte) (int, error) {
	n, err := u.r.Read(p)
	u.n += n
	return n, err
}

// What cannot be read to its end, is another size, or was not announced is refused, and
// leaves nothing.
func TestAnIntakeRefuses(t *testing.T) {
	c, dir := start(t, options{})
	body := content(3000)
	d := digest.FromBytes(body)
	in := intake(t, c, []cache.Reference{{Digest: d, Size: 3000}})
	defer in.Close()
	for name, put := range map[string]func() error{
		"a reader that fails":    func() error { return in.Put(t.Context(), d, 3000, cutAfter(2000, bytes.NewReader(body))) },
		"a reader that ends":     func() error { return in.Put(t.Context(), d, 3000, bytes.NewReader(body[:2999])) },
		"another size":           func() error { return in.Put(t.Context(), d, 2999, bytes.NewReader(body)) },
		"what was not announced": func() error { return in.Put(t.Context(), digest.FromString("x"), 1, strings.NewReader("x")) },
		"a caller who has given up": func() error {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			return in.Put(ctx, d, 3000, bytes.NewReader(body))
		},
	} {
		if err := put(); err == nil {
			t.Errorf("%s: it was taken", name)
		}
		if left := partials(t, dir); len(left) != 0 {
			t.Errorf("%s: %v is left", name, left)
		}
		nothingWrong(t, c, dir)
	}
	put(t, in, body)
	if err := in.Discard(); err != nil || len(partials(t, dir)) != 0 {
		t.Errorf("discarded: %v, %v is left", err, partials(t, dir))
	}
	if err := in.Discard(); err != nil {
		t.Errorf("discarded again: %v", err)
	}
	if _, held := c.Holds(d); held {
		t.Error("what was discarded is here")
	}
}

// There must be room for all of it, next to what is pinned; what is loose goes for it,
// but only if that is enough.
func TestAnIntakeNeedsRoom(t *testing.T) {
	held := newImage(1001, 1002)
	pins := pinning(cache.Pin{Digest: held.digest(), Firm: true})
	c, dir := start(t, options{max: 10_000, pins: pins})
	held.fill(t, c)
	loose := content(4000)
	fetch(t, c, loose)
	if !c.LookAtPins(t.Context()) {
		t.Fatal("the pins could not be looked at")
	}
	before := c.Stats()
	if before.PinnedBytes != 2003+int64(len(held.manifest)) {
		t.Errorf("%d bytes are pinned", before.PinnedBytes)
	}
	large := content(9000)
	_, err := c.Intake(t.Context(), []cache.Reference{{Digest: digest.FromBytes(large), Size: 9000}})
	if !errors.Is(err, cache.ErrNoRoom) || !here(c, loose) {
		t.Errorf("what cannot fit: %v; what is loose is here: %v", err, here(c, loose))
	}
	if after := c.Stats(); after.Bytes != before.Bytes {
		t.Errorf("it has cost %d bytes", before.Bytes-after.Bytes)
	}
	fits := content(5000)
	in := intake(t, c, []cache.Reference{{Digest: digest.FromBytes(fits), Size: 5000}})
	if here(c, loose) || !held.whole(c) {
		t.Error("what is loose did not make room, or what is pinned did")
	}
	if o := fetch(t, c, content(4500)); o != cache.Pass {
		t.Errorf("the room of an intake was given to a fill: %v", o)
	}
	if _, err := c.Intake(t.Context(), nil); !errors.Is(err, cache.ErrTaken) {
		t.Errorf("a second intake: %v", err)
	}
	put(t, in, fits)
	if err := in.Publish(t.Context()); err != nil {
		t.Fatal(err)
	}
	fetch(t, c, content(2500)) // wants its room
	if !here(c, fits) {
		t.Error("what was published was evicted before the intake was closed")
	}
	in.Close()
	c.LookAtPins(t.Context())
	fetch(t, c, content(2600))
	if here(c, fits) {
		t.Error("what nobody pins is kept for ever")
	}
	nothingWrong(t, c, dir)
}

// A client that asks for content which is being taken in gets it from its source, and
// gets in nobody's way.
func TestAnIntakeAndAPullOfTheSame(t *testing.T) {
	c, dir := start(t, options{})
	img := newImage(1000)
	bodies, content := img.parcel()
	in := intake(t, c, content)
	put(t, in, bodies[0])
	put(t, in, bodies[1])
	if o := fetch(t, c, bodies[1]); o != cache.Pass {
		t.Errorf("outcome %v, want pass", o)
	}
	if err := in.Publish(t.Context()); err != nil {
		t.Fatal(err)
	}
	in.Close()
	if o := fetch(t, c, bodies[1]); o != cache.Hit {
		t.Errorf("outcome %v, want a hit", o)
	}
	nothingWrong(t, c, dir)
}

// An intake waits for fills of the same content.
func TestAnIntakeWaitsForFills(t *testing.T) {
	c, dir := start(t, options{})
	body := content(3000)
	d := digest.FromBytes(body)
	arrive := make(chan struct{})
	src := &source{body: body, before: func(context.Context, int) error { <-arrive; return nil }}
	pulled := make(chan error)
	go func() { _, _, err := get(t.Context(), c, d, src); pulled <- err }()
	for len(c.Stats().Fills) == 0 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Intake(ctx, []cache.Reference{{Digest: d, Size: 3000}}); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who gives up: %v", err)
	}
	close(arrive)
	in := intake(t, c, []cache.Reference{{Digest: d, Size: 3000}})
	defer in.Close()
	if err := <-pulled; err != nil {
		t.Error(err)
	}
	if err := in.Put(t.Context(), d, 3000, broken{}); err != nil {
		t.Errorf("what is here already: %v", err)
	}
	if err := in.Publish(t.Context()); err != nil {
		t.Error(err)
	}
	nothingWrong(t, c, dir)
}

// A store that cannot make content durable or visible, or says so although it has:
// Publish tells, what is visible is right, and the next try ends well, of this intake or
// of the next.
func TestAnIntakeWhoseStoreFails(t *testing.T) {
	for _, op := range []string{"sync", "commit", "sync folders"} {
		for _, done := range []bool{false, true} {
			for _, anew := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, done=%v, anew=%v", op, done, anew), func(t *testing.T) {
					f := &failing{op: op, done: done}
					c, dir := start(t, options{store: f.on})
					img := newImage(1000, 2000)
					bodies, content := img.parcel()
					in := intake(t, c, content)
					for _, b := range bodies {
						put(t, in, b)
					}
					f.times.Store(1)
					if err := in.Publish(t.Context()); !errors.Is(err, errDisk) {
						t.Fatalf("Publish = %v, want what the disk said", err)
					}
					nothingWrong(t, c, dir)
					if n := c.Stats().Blobs; op == "sync" && n != 0 {
						t.Errorf("%d pieces are visible, and not all are durable", n)
					}
					if op != "sync folders" && here(c, img.manifest) {
						t.Error("the manifest is visible without what it refers to")
					}
					if anew {
						in.Close()
						nothingWrong(t, c, dir)
						in = intake(t, c, content)
					}
					for _, b := range bodies {
						put(t, in, b)
					}
					if err := in.Publish(t.Context()); err != nil {
						t.Fatal(err)
					}
					in.Close()
					if !img.whole(c) || len(partials(t, dir)) != 0 {
						t.Errorf("it is not whole, or %v is left", partials(t, dir))
					}
					nothingWrong(t, c, dir)
				})
			}
		}
	}
}

var errDisk = errors.New("input/output error")

// failing fails some operations of a store, before or after they are done.
type failing struct {
	cache.Store
	op    string // remove, sync, commit, sync folders
	done  bool
	times atomic.Int64 // that it fails
}

func (f *failing) on(s cache.Store) cache.Store { f.Store = s; return f }

// do does one operation as it is told; instead is what is done if it is refused.
func (f *failing) do(op string, do, instead func() error) error {
	switch {
	case op != f.op || f.times.Add(-1) < 0:
		return do()
	case f.done:
		return errors.Join(do(), errDisk)
	}
	return errors.Join(instead(), errDisk)
}

func nothing() error { return nil }

func (f *failing) Sync() error { return f.do("sync folders", f.Store.Sync, nothing) }

func (f *failing) Remove(e cache.Entry) error {
	return f.do("remove", func() error { return f.Store.Remove(e) }, nothing)
}

func (f *failing) Begin(d digest.Digest) (cache.Partial, error) {
	p, err := f.Store.Begin(d)
	return failingPartial{p, f}, err
}

type failingPartial struct {
	cache.Partial
	f *failing
}

func (p failingPartial) Sync() error   { return p.f.do("sync", p.Partial.Sync, nothing) }
func (p failingPartial) Commit() error { return p.f.do("commit", p.Partial.Commit, p.Partial.Discard) }

// All bytes are durable before the first name is visible, names become visible from the
// layers to the manifest, and the folders are synced in the end.
func TestAnIntakeIsDurableBeforeItIsVisible(t *testing.T) {
	var did diary
	c, dir := start(t, options{store: did.on})
	img := newImage(1000, 2000)
	bodies, content := img.parcel()
	in := intake(t, c, content)
	defer in.Close()
	for _, b := range bodies {
		put(t, in, b)
	}
	if err := in.Publish(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := []string{"sync", "sync", "sync"}
	for _, r := range slices.Backward(content) {
		want = append(want, "commit "+r.Digest.String())
	}
	if want = append(want, "sync folders"); !slices.Equal(did.lines, want) {
		t.Errorf("it did %q, want %q", did.lines, want)
	}
	nothingWrong(t, c, dir)
}

// What became visible is kept until the intake ends, also while Publish is still at work.
func TestWhatIsPublishedIsKeptFromTheFirstName(t *testing.T) {
	var c *cache.Cache
	d := &diary{}
	d.synced = func() { fetch(t, c, content(3500)) } // wants all the room there is
	c, dir := start(t, options{max: 5000, store: d.on})
	img := newImage(1000, 2000)
	bodies, list := img.parcel()
	in := intake(t, c, list)
	defer in.Close()
	for _, b := range bodies {
		put(t, in, b)
	}
	if err := in.Publish(t.Context()); err != nil || !img.whole(c) {
		t.Errorf("Publish = %v, whole %t", err, img.whole(c))
	}
	nothingWrong(t, c, dir)
}

// A diary notes what a store did that concerns a power cut.
type diary struct {
	cache.Store
	synced func() // done when the folders are; may be nil
	mu     sync.Mutex
	lines  []string
}

func (d *diary) on(s cache.Store) cache.Store { d.Store = s; return d }

func (d *diary) note(line string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, line)
}

func (d *diary) Sync() error {
	d.note("sync folders")
	if d.synced != nil {
		d.synced()
	}
	return d.Store.Sync()
}

func (d *diary) Begin(dgst digest.Digest) (cache.Partial, error) {
	p, err := d.Store.Begin(dgst)
	return noted{p, d, dgst}, err
}

type noted struct {
	cache.Partial
	d    *diary
	dgst digest.Digest
}

func (p noted) Sync() error   { p.d.note("sync"); return p.Partial.Sync() }
func (p noted) Commit() error { p.d.note("commit " + p.dgst.String()); return p.Partial.Commit() }

// Whenever the process is killed, what the next one finds is right and no manifest is
// there without its layers; and the same intake ends well.
func TestAnIntakeThatIsKilled(t *testing.T) {
	img := newImage(1000, 2000)
	bodies, content := img.parcel()
	takeIn := func(c *cache.Cache) error {
		in, err := c.Intake(t.Context(), content)
		for i := 0; err == nil && i < len(bodies); i++ {
			err = in.Put(t.Context(), content[i].Digest, content[i].Size, bytes.NewReader(bodies[i]))
		}
		if err == nil {
			err = in.Publish(t.Context())
		}
		return err
	}
	for n, done := int64(0), false; !done; n++ {
		if n > 100 {
			t.Fatal("it does not end well, however late it is killed")
		}
		dir := t.TempDir()
		t.Run(fmt.Sprintf("after %d operations", n), func(t *testing.T) {
			m := &mortal{}
			m.left.Store(n)
			c, _ := start(t, options{dir: dir, store: m.on})
			done = takeIn(c) == nil
		})
		c, _ := start(t, options{dir: dir})
		nothingWrong(t, c, dir)
		if here(c, img.manifest) && !img.whole(c) {
			t.Errorf("killed after %d operations: the manifest is here without its layers", n)
		}
		if done && !img.whole(c) {
			t.Error("it was published, and is not here")
		}
		if err := takeIn(c); err != nil || !img.whole(c) || len(partials(t, dir)) != 0 {
			t.Errorf("killed after %d operations, and again: %v, whole %t, %v is left", n, err, img.whole(c), partials(t, dir))
		}
		nothingWrong(t, c, dir)
	}
}

// mortal stands for a process that is killed after so many operations: none is done any
// more then, and a write is done by half.
type mortal struct {
	cache.Store
	left atomic.Int64
}

func (m *mortal) on(s cache.Store) cache.Store { m.Store = s; return m }

var errKilled = errors.New("killed")

func (m *mortal) do(do func() error) error {
	if m.left.Add(-1) < 0 {
		return errKilled
	}
	return do()
}

func (m *mortal) Sync() error                { return m.do(m.Store.Sync) }
func (m *mortal) Remove(e cache.Entry) error { return m.do(func() error { return m.Store.Remove(e) }) }

func (m *mortal) Begin(d digest.Digest) (p cache.Partial, err error) {
	err = m.do(func() error { p, err = m.Store.Begin(d); return err })
	return mortalPartial{p, m}, err
}

type mortalPartial struct {
	cache.Partial
	m *mortal
}

func (p mortalPartial) Reset() error   { return p.m.do(p.Partial.Reset) }
func (p mortalPartial) Sync() error    { return p.m.do(p.Partial.Sync) }
func (p mortalPartial) Commit() error  { return p.m.do(p.Partial.Commit) }
func (p mortalPartial) Keep() error    { return p.m.do(p.Partial.Keep) }
func (p mortalPartial) Discard() error { return p.m.do(p.Partial.Discard) }

func (p mortalPartial) Write(b []byte) (n int, err error) {
	err = p.m.do(func() error { n, err = p.Partial.Write(b); return err })
	if err == errKilled {
		n, _ = p.Partial.Write(b[:len(b)/2])
	}
	return n, err
}

// Content that was stored when the intake began and was found to be wrong meanwhile is
// missing: it is not said to be published, and the next intake takes it in.
func TestAnIntakeWhoseStoredContentGoesAway(t *testing.T) {
	for _, early := range []bool{true, false} {
		t.Run(fmt.Sprintf("before it is put %t", early), func(t *testing.T) {
			c, dir := start(t, options{})
			img := newImage(1000, 2000)
			bodies, content := img.parcel()
			fetch(t, c, bodies[1])
			in := intake(t, c, content)
			scrub := func() {
				spoil(t, dir, bodies[1])
				if _, err := c.Scrub(t.Context(), cache.ScrubOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			if early {
				scrub()
				if err := in.Put(t.Context(), content[1].Digest, content[1].Size, bytes.NewReader(bodies[1])); err == nil {
					t.Error("it is said to be taken in, and there is no room promised for it")
				}
			} else {
				put(t, in, bodies[1])
				scrub()
			}
			put(t, in, bodies[0])
			put(t, in, bodies[2])
			if err := in.Publish(t.Context()); err == nil || here(c, img.manifest) {
				t.Errorf("Publish = %v, the manifest is visible: %t", err, here(c, img.manifest))
			}
			in.Close()
			nothingWrong(t, c, dir)
			again := intake(t, c, content)
			defer again.Close()
			for _, b := range bodies {
				put(t, again, b)
			}
			if err := again.Publish(t.Context()); err != nil || !img.whole(c) {
				t.Errorf("again: %v, whole %t", err, img.whole(c))
			}
			nothingWrong(t, c, dir)
		})
	}
}

// What went away and was pulled again meanwhile is kept like all the rest.
func TestAnIntakeKeepsWhatCameAgain(t *testing.T) {
	c, dir := start(t, options{max: 5000})
	img := newImage(1000, 2000)
	bodies, list := img.parcel()
	fetch(t, c, bodies[1])
	in := intake(t, c, list)
	defer in.Close()
	spoil(t, dir, bodies[1])
	if _, err := c.Scrub(t.Context(), cache.ScrubOptions{}); err != nil || here(c, bodies[1]) {
		t.Fatalf("Scrub = %v, what is wrong is here: %t", err, here(c, bodies[1]))
	}
	if o := fetch(t, c, bodies[1]); o != cache.Fill {
		t.Errorf("asked for again it is a %v", o)
	}
	for _, b := range bodies {
		put(t, in, b)
	}
	if err := in.Publish(t.Context()); err != nil {
		t.Fatal(err)
	}
	fetch(t, c, content(2001)) // wants room
	if !img.whole(c) {
		t.Error("some of it was evicted before the intake was closed")
	}
	nothingWrong(t, c, dir)
}

// What an earlier intake has left needs no room twice, neither of the budget nor of the
// disk; and it counts again when the intake ends without it.
func TestWhatIsLeftIsCountedOnce(t *testing.T) {
	f := &faulty{free: 10_000, writable: -1}
	c, dir := start(t, options{max: 10_000, store: func(s cache.Store) cache.Store { f.Store = s; return f }})
	body, small := content(9000), content(500)
	fetch(t, c, small)
	list := []cache.Reference{{Digest: digest.FromBytes(body), Size: 9000}}
	in := intake(t, c, list)
	put(t, in, body)
	in.Close()
	f.free = 600 // the rest of the disk is in partial/
	in = intake(t, c, list)
	if !here(c, small) {
		t.Error("what is loose was evicted for what is here already")
	}
	in.Close() // without a Put
	f.free = 1 << 30
	if o := fetch(t, c, content(5000)); o != cache.Fill || len(partials(t, dir)) != 0 {
		t.Errorf("outcome %v, left %v; want what is unfinished to make room within the budget", o, partials(t, dir))
	}
	nothingWrong(t, c, dir)
}

// A caller who gives up while it is looked at what was left loses nothing of that.
func TestGivingUpKeepsWhatWasLeft(t *testing.T) {
	c, dir := start(t, options{})
	body := content(3000)
	list := []cache.Reference{{Digest: digest.FromBytes(body), Size: 3000}}
	in := intake(t, c, list)
	put(t, in, body)
	in.Close()
	in = intake(t, c, list)
	defer in.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := in.Put(ctx, list[0].Digest, 3000, broken{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Put = %v, want context.Canceled", err)
	}
	if err := in.Put(t.Context(), list[0].Digest, 3000, broken{}); err != nil {
		t.Errorf("what was left had to be read again: %v", err)
	}
	nothingWrong(t, c, dir)
}

// An intake that has ended publishes nothing, and keeps nothing.
func TestAnIntakeThatHasEnded(t *testing.T) {
	c, dir := start(t, options{})
	body := content(1000)
	fetch(t, c, body)
	in := intake(t, c, []cache.Reference{{Digest: digest.FromBytes(body), Size: 1000}})
	in.Close()
	in.Close()
	if err := in.Publish(t.Context()); err == nil {
		t.Error("it was published")
	}
	c.LookAtPins(t.Context())
	if err := c.Remove(digest.FromBytes(body)); err != nil {
		t.Errorf("what it kept is kept for ever: %v", err)
	}
	nothingWrong(t, c, dir)
}

// Clients who pull, operators who remove, scrubs and intakes of the same content at the
// same time: clients get right bytes, and index and disk agree in the end.
func TestIntakesScrubsRemovalsAndPullsAtOnce(t *testing.T) {
	c, dir := start(t, options{max: 40_000})
	img := newImage(3001, 3002, 3003)
	bodies, list := img.parcel()
	var wg sync.WaitGroup
	each := func(do func(b []byte, d digest.Digest) error) {
		wg.Go(func() {
			for range 20 {
				for _, b := range bodies {
					if err := do(b, digest.FromBytes(b)); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for range 3 {
		each(func(b []byte, d digest.Digest) error {
			got, _, err := get(t.Context(), c, d, &source{body: b})
			if err == nil && !bytes.Equal(got, b) {
				err = fmt.Errorf("a client got %d other bytes", len(got))
			}
			return err
		})
	}
	each(func(_ []byte, d digest.Digest) error {
		if err := c.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, cache.ErrPinned) {
			return err
		}
		return nil
	})
	each(func([]byte, digest.Digest) error {
		_, err := c.Scrub(t.Context(), cache.ScrubOptions{Wrong: func(_ context.Context, d digest.Digest, _ int64, err error) {
			t.Errorf("%s is told to be wrong: %v", d, err)
		}})
		return err
	})
	wg.Go(func() {
		for range 20 {
			in, err := c.Intake(t.Context(), list)
			if err != nil {
				t.Error(err)
				return
			}
			for i, b := range bodies {
				err = errors.Join(err, in.Put(t.Context(), list[i].Digest, list[i].Size, bytes.NewReader(b)))
			}
			if err = errors.Join(err, in.Publish(t.Context())); err != nil || !img.whole(c) {
				t.Errorf("an intake: %v, whole %t", err, img.whole(c))
			}
			in.Close()
			c.LookAtPins(t.Context())
		}
	})
	wg.Wait()
	nothingWrong(t, c, dir)
	if left := partials(t, dir); len(left) != 0 {
		t.Errorf("%v is left", left)
	}
}
