package cache_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
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

// A store that cannot make content durable, or says so although it has: Publish tells,
// what is visible is right, and the next try ends well.
func TestAnIntakeWhoseStoreFails(t *testing.T) {
	for _, done := range []bool{false, true} {
		t.Run(fmt.Sprintf("done=%v", done), func(t *testing.T) {
			var fails *failingCommits
			c, dir := start(t, options{store: func(s cache.Store) cache.Store { fails = &failingCommits{Store: s, done: done}; return fails }})
			img := newImage(1000, 2000)
			bodies, content := img.parcel()
			in := intake(t, c, content)
			for _, b := range bodies {
				put(t, in, b)
			}
			fails.left.Store(1)
			if err := in.Publish(t.Context()); err == nil {
				t.Fatal("a failure was not told")
			}
			in.Close()
			again := intake(t, c, content)
			defer again.Close()
			for _, b := range bodies {
				put(t, again, b)
			}
			if err := again.Publish(t.Context()); err != nil {
				t.Fatal(err)
			}
			if !img.whole(c) {
				t.Error("it is not whole")
			}
			nothingWrong(t, c, dir)
		})
	}
}

// failingCommits fails some commits, before or after they are done.
type failingCommits struct {
	cache.Store
	done bool
	left atomic.Int64
}

type failingCommit struct {
	cache.Partial
	f *failingCommits
}

func (f *failingCommits) Begin(d digest.Digest) (cache.Partial, error) {
	p, err := f.Store.Begin(d)
	if err != nil || f.left.Add(-1) < 0 {
		return p, err
	}
	return failingCommit{p, f}, nil
}

func (p failingCommit) Commit() error {
	if !p.f.done {
		return errors.Join(errors.New("no space left on device"), p.Discard())
	}
	return errors.Join(p.Partial.Commit(), errors.New("input/output error"))
}
