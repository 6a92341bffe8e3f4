package cache_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/cache"
)

// A clock is time that a test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Now()} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func fetch(t *testing.T, c *cache.Cache, body []byte) cache.Outcome {
	t.Helper()
	got, o, err := get(t.Context(), c, digest.FromBytes(body), &source{body: body})
	if err != nil || !bytes.Equal(got, body) {
		t.Fatalf("get: %d bytes, %v", len(got), err)
	}
	settled(c)
	return o
}

func here(c *cache.Cache, body []byte) bool {
	_, ok := c.Stat(digest.FromBytes(body))
	return ok
}

// What was not used for the longest time goes first, the budget is kept after
// every step, and the order survives a restart.
func TestLeastRecentlyUsedGoesFirstAlsoAfterARestart(t *testing.T) {
	clk := newClock()
	o := options{max: 4000, now: clk.Now, dir: t.TempDir()}
	var c *cache.Cache
	blob := func(i int) []byte { return content(1000 + i) } // four do not fit, three do
	t.Run("before", func(t *testing.T) {
		c, _ = start(t, o)
		for i := range 3 {
			fetch(t, c, blob(i))
			clk.advance(time.Hour)
			fetch(t, c, blob(i)) // a use is recorded, a commit has the time of the disk
			clk.advance(time.Hour)
		}
		if o := fetch(t, c, blob(0)); o != cache.Hit { // now blob 1 is the oldest
			t.Errorf("outcome %v, want a hit", o)
		}
		clk.advance(time.Hour)
	})
	c, dir := start(t, o)
	fetch(t, c, blob(3))
	if s := c.Stats(); s.Bytes > 4000 {
		t.Errorf("%d bytes are stored, more than the budget", s.Bytes)
	}
	for i, want := range []bool{true, false, true, true} {
		if got := here(c, blob(i)); got != want {
			t.Errorf("blob %d is here: %t, want %t", i, got, want)
		}
	}
	nothingWrong(t, c, dir)
}

// A manifest is evicted before its layers, although it was served after they
// were, and also when it shares a layer with another one.
func TestManifestGoesBeforeItsLayers(t *testing.T) {
	clk := newClock()
	c, dir := start(t, options{max: 10_000, now: clk.Now})
	layers := [][]byte{content(1001), content(1002), content(1003)}
	var refs []digest.Digest
	for _, l := range layers {
		refs = append(refs, digest.FromBytes(l))
		fetch(t, c, l)
		clk.advance(time.Hour)
	}
	manifest, err := json.Marshal(refs)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 { // served again and again: the layers are used with it
		if _, _, err := c.Manifest(t.Context(), digest.FromBytes(manifest), &source{body: manifest}); err != nil {
			t.Fatal(err)
		}
		clk.advance(time.Hour)
	}
	for i := range 20 {
		fetch(t, c, content(500+i))
		clk.advance(time.Minute)
		all := here(c, layers[0]) && here(c, layers[1]) && here(c, layers[2])
		if here(c, manifest) && !all {
			t.Fatalf("after %d more blobs the manifest is here without all of its layers", i+1)
		}
		nothingWrong(t, c, dir)
	}
	if here(c, manifest) {
		t.Error("the manifest was never evicted; the test tests nothing")
	}
}

// Content that can never fit, or for which nothing can go, is passed on and not
// kept; what is here stays.
func TestContentWithoutRoomIsPassedOn(t *testing.T) {
	c, dir := start(t, options{max: 10_000})
	small, large := content(1000), content(20_000)
	fetch(t, c, small)
	if o := fetch(t, c, large); o != cache.Pass {
		t.Errorf("outcome %v, want pass", o)
	}
	if !here(c, small) || here(c, large) {
		t.Error("the small content should be here, the large one not")
	}
	wrong := bytes.Clone(large)
	wrong[7] ^= 1
	got, _, err := get(t.Context(), c, digest.FromBytes(large), &source{body: wrong})
	if !errors.Is(err, cache.ErrMismatch) || len(got) >= len(large) {
		t.Errorf("wrong content passed on: %d bytes, %v", len(got), err)
	}
	nothingWrong(t, c, dir)
}

// A faulty store stands for a disk that is full or broken.
type faulty struct {
	cache.Store
	free     int64
	writable int64 // bytes until a write fails, -1 for no limit
	commit   func(p cache.Partial) error
}

func (f *faulty) Free() (int64, error) { return f.free, nil }

func (f *faulty) Begin(dgst digest.Digest) (cache.Partial, error) {
	if f.writable == 0 {
		return nil, syscall.ENOSPC
	}
	p, err := f.Store.Begin(dgst)
	return &faultyPartial{p, f}, err
}

type faultyPartial struct {
	cache.Partial
	f *faulty
}

func (p *faultyPartial) Write(b []byte) (int, error) {
	if p.f.writable >= 0 {
		if p.Size()+int64(len(b)) > p.f.writable {
			return 0, syscall.ENOSPC
		}
	}
	return p.Partial.Write(b)
}

func (p *faultyPartial) Commit() error {
	if p.f.commit != nil {
		return p.f.commit(p.Partial)
	}
	return p.Partial.Commit()
}

// A disk that is full, from the beginning or half-way, makes pulls uncached and
// not broken, for everybody who was reading.
func TestFullDiskMakesPullsUncachedNotBroken(t *testing.T) {
	for _, tt := range []struct {
		name     string
		free     int64
		writable int64
	}{
		{"less free than is to be left", 100, -1},
		{"nothing can be created", 1 << 40, 0},
		{"full half-way", 1 << 40, 1_500_000},
	} {
		for _, noSize := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, size not told %t", tt.name, noSize), func(t *testing.T) {
				c, dir := start(t, options{free: 1000, store: func(s cache.Store) cache.Store {
					return &faulty{Store: s, free: tt.free, writable: tt.writable}
				}})
				body := content(4 << 20)
				src := &source{body: body, noSize: noSize}
				var wg sync.WaitGroup
				for range 4 {
					wg.Go(func() {
						got, _, err := get(t.Context(), c, digest.FromBytes(body), src)
						if err != nil || !bytes.Equal(got, body) {
							t.Errorf("client got %d bytes, %v", len(got), err)
						}
						got, _, err = getRange(t.Context(), c, digest.FromBytes(body), src, 3<<20, 1<<20)
						if noSize {
							return
						}
						if err != nil || !bytes.Equal(got, body[3<<20:]) {
							t.Errorf("client got %d bytes of a range, %v", len(got), err)
						}
					})
				}
				wg.Wait()
				if here(c, body) {
					t.Error("content is said to be here")
				}
				nothingWrong(t, c, dir)
			})
		}
	}
}

// A commit that is refused, or done and reported as failed, costs the copy and
// not the pull, and the next request gets the right content.
func TestFailedCommits(t *testing.T) {
	for name, commit := range map[string]func(cache.Partial) error{
		"refused": func(p cache.Partial) error { return errors.Join(p.Discard(), syscall.EIO) },
		"done but reported as failed": func(p cache.Partial) error {
			return errors.Join(p.Commit(), syscall.EIO)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := &faulty{free: 1 << 40, writable: -1, commit: commit}
			c, dir := start(t, options{store: func(s cache.Store) cache.Store { f.Store = s; return f }})
			body := content(100_000)
			fetch(t, c, body)
			f.commit = nil
			fetch(t, c, body)
			nothingWrong(t, c, dir)
			if o := fetch(t, c, body); o != cache.Hit {
				t.Errorf("outcome %v, want a hit at last", o)
			}
		})
	}
}

// What a crashed download left counts against the budget, goes first, and does
// not stay for ever.
func TestUnfinishedContentIsBoundedToo(t *testing.T) {
	dir := t.TempDir()
	partial := func(body []byte, age time.Duration) string {
		path := filepath.Join(dir, "partial", "sha256-"+digest.FromBytes(body).Encoded())
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, body[:len(body)/2], 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	old, recent := partial(content(3001), 48*time.Hour), partial(content(3002), time.Hour)
	kept := content(1000)
	c, _ := start(t, options{dir: dir, max: 3000})
	if _, err := os.Stat(old); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a download that nobody resumed for two days is still there: %v", err)
	}
	fetch(t, c, kept)
	if _, err := os.Stat(recent); err != nil {
		t.Errorf("a recent download should still be there: %v", err)
	}
	fetch(t, c, content(1100))
	if _, err := os.Stat(recent); !errors.Is(err, fs.ErrNotExist) || !here(c, kept) {
		t.Errorf("the unfinished content should have gone first: %v", err)
	}
	nothingWrong(t, c, dir)
}

// An image's layers are fetched when its manifest is asked for, each once, and
// a client that then asks for one joins.
func TestPrefetch(t *testing.T) {
	c, dir := start(t, options{})
	var refs []digest.Digest
	srcs := make(map[digest.Digest]*source)
	for i := range 20 {
		body := content(10_000 + i)
		refs = append(refs, digest.FromBytes(body))
		srcs[digest.FromBytes(body)] = &source{body: body}
	}
	manifest, err := json.Marshal(refs)
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := c.Manifest(t.Context(), digest.FromBytes(manifest), &source{body: manifest})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		c.Prefetch(m, func(r cache.Reference) cache.Source { return srcs[r.Digest] })
	}
	for _, r := range refs {
		if got, _, err := get(t.Context(), c, r, srcs[r]); err != nil || digest.FromBytes(got) != r {
			t.Errorf("layer: %d bytes, %v", len(got), err)
		}
	}
	settled(c)
	for _, r := range refs {
		if n := srcs[r].opened(); n != 1 {
			t.Errorf("a layer's source was opened %d times, want 1", n)
		}
	}
	nothingWrong(t, c, dir)
}
