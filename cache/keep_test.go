package cache_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/cache"
)

// spoil changes a byte of stored content.
func spoil(t *testing.T, dir string, body []byte) {
	t.Helper()
	wrong := bytes.Clone(body)
	wrong[len(wrong)/2] ^= 1
	if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", digest.FromBytes(body).Encoded()), wrong, 0o644); err != nil {
		t.Fatal(err)
	}
}

// A scrub finds what the disk has spoiled, removes it and nothing else, and tells.
func TestAScrubFindsWhatIsWrong(t *testing.T) {
	c, dir := start(t, options{})
	var bodies [][]byte
	for i := range 5 {
		bodies = append(bodies, content(1000+i))
		fetch(t, c, bodies[i])
	}
	spoil(t, dir, bodies[1])
	spoil(t, dir, bodies[3])
	open, err := c.OpenStored(digest.FromBytes(bodies[1]))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := c.Verify(t.Context(), digest.FromBytes(bodies[1])); !errors.Is(err, cache.ErrMismatch) || !here(c, bodies[1]) {
		t.Errorf("Verify = %v; it removes nothing", err)
	}
	if err := c.Verify(t.Context(), digest.FromBytes(bodies[0])); err != nil {
		t.Errorf("what is right: %v", err)
	}
	if err := c.Verify(t.Context(), digest.FromString("absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not here: %v", err)
	}
	var wrong []digest.Digest
	told := 0
	report, err := c.Scrub(t.Context(), cache.ScrubOptions{
		Progress: func(cache.ScrubReport) { told++ },
		Wrong: func(_ context.Context, d digest.Digest, size int64, err error) {
			if !errors.Is(err, cache.ErrMismatch) || size < 1000 {
				t.Errorf("%s of %d bytes: %v", d, size, err)
			}
			if _, held := c.Holds(d); held {
				t.Error("what is wrong is still here when it is told")
			}
			wrong = append(wrong, d)
		},
	})
	want := []digest.Digest{digest.FromBytes(bodies[1]), digest.FromBytes(bodies[3])}
	slices.Sort(want)
	if err != nil || report.Checked != 5 || report.Bytes != 5010 || told != 5 || !slices.Equal(wrong, want) {
		t.Errorf("Scrub = %+v, %v, told %d times, wrong are %v", report, err, told, wrong)
	}
	if b, err := io.ReadAll(open); err != nil || len(b) != 1001 {
		t.Errorf("whoever was reading it: %d bytes, %v", len(b), err)
	}
	nothingWrong(t, c, dir)
	if report, err := c.Scrub(t.Context(), cache.ScrubOptions{}); err != nil || report.Checked != 3 {
		t.Errorf("again: %+v, %v", report, err)
	}
}

// A scrub that is interrupted goes on where it was.
func TestAScrubGoesOn(t *testing.T) {
	c, _ := start(t, options{})
	for i := range 6 {
		fetch(t, c, content(1000+i))
	}
	ctx, cancel := context.WithCancel(t.Context())
	first, err := c.Scrub(ctx, cache.ScrubOptions{Progress: func(r cache.ScrubReport) {
		if r.Checked == 2 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) || first.Checked != 2 || first.Last == "" {
		t.Fatalf("interrupted: %+v, %v", first, err)
	}
	rest, err := c.Scrub(t.Context(), cache.ScrubOptions{From: first.Last})
	if err != nil || rest.Checked != 4 {
		t.Errorf("the rest: %+v, %v", rest, err)
	}
}

// A scrub reads no faster than it may.
func TestAScrubKeepsItsRate(t *testing.T) {
	dir := t.TempDir()
	t.Run("fill", func(t *testing.T) {
		c, _ := start(t, options{dir: dir})
		fetch(t, c, content(3<<20))
		fetch(t, c, content(1<<20))
	})
	synctest.Test(t, func(t *testing.T) {
		c, stop := startUnready(t, options{dir: dir})
		defer stop()
		synctest.Wait()
		began := time.Now()
		if _, err := c.Scrub(t.Context(), cache.ScrubOptions{Rate: 1 << 20}); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took < 4*time.Second || took > 5*time.Second {
			t.Errorf("4 MiB at 1 MiB/s took %v", took)
		}
	})
}

// What cannot be read is told, and stays: it is the disk that has trouble.
func TestAScrubKeepsWhatItCannotRead(t *testing.T) {
	broken := &unreadable{}
	c, dir := start(t, options{store: func(s cache.Store) cache.Store { broken.Store = s; return broken }})
	body := content(1000)
	fetch(t, c, body)
	broken.fails = true
	var found error
	if _, err := c.Scrub(t.Context(), cache.ScrubOptions{Wrong: func(_ context.Context, _ digest.Digest, _ int64, err error) { found = err }}); err != nil {
		t.Fatal(err)
	}
	broken.fails = false
	if found == nil || errors.Is(found, cache.ErrMismatch) || !here(c, body) {
		t.Errorf("told %v; it is here: %v", found, here(c, body))
	}
	nothingWrong(t, c, dir)
}

// A scrub that is interrupted while it takes its second look has convicted nobody: what
// is wrong is still here, nobody was told, and the next pass finds it.
func TestAScrubInterruptedInItsSecondLook(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	w := &watched{}
	c, dir := start(t, options{store: w.on})
	body := content(1000)
	fetch(t, c, body)
	spoil(t, dir, body)
	w.opening(2, cancel)
	var wrong []digest.Digest
	note := func(_ context.Context, d digest.Digest, _ int64, _ error) { wrong = append(wrong, d) }
	report, err := c.Scrub(ctx, cache.ScrubOptions{Wrong: note})
	if !errors.Is(err, context.Canceled) || report.Checked != 0 || report.Last != "" || len(wrong) != 0 || !here(c, body) {
		t.Errorf("interrupted: %+v, %v, %d told, here %t; want it all to do again", report, err, len(wrong), here(c, body))
	}
	if _, err := c.Scrub(t.Context(), cache.ScrubOptions{From: report.Last, Wrong: note}); err != nil || len(wrong) != 1 || here(c, body) {
		t.Errorf("again: %v, %d told, here %t; want it found", err, len(wrong), here(c, body))
	}
	nothingWrong(t, c, dir)
}

// A scrub does not remove what came in place of what it has found to be wrong.
func TestAScrubSparesWhatCameAnew(t *testing.T) {
	w := &watched{}
	c, dir := start(t, options{store: w.on})
	body := content(1000)
	fetch(t, c, body)
	spoil(t, dir, body)
	w.closing(2, func() { // the second look has just ended
		if err := c.Remove(digest.FromBytes(body)); err != nil {
			t.Error(err)
		}
		fetch(t, c, body)
	})
	told := 0
	if _, err := c.Scrub(t.Context(), cache.ScrubOptions{Wrong: func(context.Context, digest.Digest, int64, error) { told++ }}); err != nil {
		t.Fatal(err)
	}
	if !here(c, body) || told != 0 {
		t.Errorf("what came anew is here: %t; told %d times", here(c, body), told)
	}
	nothingWrong(t, c, dir)
}

// What is evicted or removed during a scrub is passed over; what somebody took out of the
// folder is told, and said to be here no longer.
func TestAScrubOfWhatGoesAway(t *testing.T) {
	c, dir := start(t, options{})
	var all, told []digest.Digest
	for i := range 3 {
		body := content(1000 + i)
		fetch(t, c, body)
		all = append(all, digest.FromBytes(body))
	}
	slices.Sort(all)
	report, err := c.Scrub(t.Context(), cache.ScrubOptions{
		Progress: func(r cache.ScrubReport) {
			if r.Checked != 1 {
				return
			}
			if err := c.Remove(all[1]); err != nil {
				t.Error(err)
			}
			if err := os.Remove(filepath.Join(dir, "blobs/sha256", all[2].Encoded())); err != nil {
				t.Error(err)
			}
		},
		Wrong: func(_ context.Context, d digest.Digest, _ int64, err error) {
			if told = append(told, d); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is told to be wrong: %v", d, err)
			}
		},
	})
	if err != nil || report.Checked != 3 || !slices.Equal(told, all[2:]) {
		t.Errorf("Scrub = %+v, %v; it told of %v", report, err, told)
	}
	if _, held := c.Holds(all[2]); held {
		t.Error("what is not in the folder is said to be here")
	}
	nothingWrong(t, c, dir)
}

// A removal that is refused, or done and reported as failed, is told, and the next one
// ends well: nothing is said to be here that is not.
func TestFailedRemovals(t *testing.T) {
	for _, done := range []bool{false, true} {
		for _, by := range []string{"remove", "scrub"} {
			t.Run(fmt.Sprintf("%s, done=%v", by, done), func(t *testing.T) {
				f := &failing{op: "remove", done: done}
				c, dir := start(t, options{store: f.on})
				body := content(1000)
				d := digest.FromBytes(body)
				fetch(t, c, body)
				remove := func() error { return c.Remove(d) }
				if by == "scrub" {
					spoil(t, dir, body)
					remove = func() (found error) {
						_, err := c.Scrub(t.Context(), cache.ScrubOptions{Wrong: func(_ context.Context, _ digest.Digest, _ int64, err error) { found = err }})
						return errors.Join(err, found)
					}
				}
				f.times.Store(1)
				if err := remove(); !errors.Is(err, errDisk) || errors.Is(err, cache.ErrMismatch) {
					t.Errorf("the first time: %v, want what the disk said", err)
				}
				if err := remove(); errors.Is(err, errDisk) {
					t.Errorf("the second time: %v", err)
				}
				if here(c, body) {
					t.Error("it is said to be here")
				}
				nothingWrong(t, c, dir)
				if o := fetch(t, c, body); o != cache.Fill {
					t.Errorf("asked for again it is a %v", o)
				}
				nothingWrong(t, c, dir)
			})
		}
	}
}

// watched does something when content is opened, or closed, the n-th time from now on.
type watched struct {
	cache.Store
	opens         int // left until then
	opened, close func()
}

func (w *watched) on(s cache.Store) cache.Store { w.Store = s; return w }
func (w *watched) opening(n int, do func())     { w.opens, w.opened, w.close = n, do, nil }
func (w *watched) closing(n int, do func())     { w.opens, w.opened, w.close = n, nil, do }

func (w *watched) Open(d digest.Digest) (cache.File, cache.Entry, error) {
	f, e, err := w.Store.Open(d)
	if w.opens--; w.opens != 0 || err != nil {
		return f, e, err
	}
	if w.opened != nil {
		w.opened()
	}
	return watchedFile{f, w.close}, e, err
}

type watchedFile struct {
	cache.File
	closed func()
}

func (f watchedFile) Close() error {
	err := f.File.Close()
	if f.closed != nil {
		f.closed()
	}
	return err
}

type unreadable struct {
	cache.Store
	fails bool
}

func (u *unreadable) Open(d digest.Digest) (cache.File, cache.Entry, error) {
	f, e, err := u.Store.Open(d)
	if err == nil && u.fails {
		return badFile{f}, e, nil
	}
	return f, e, err
}

type badFile struct{ cache.File }

func (badFile) Read([]byte) (int, error) { return 0, errors.New("input/output error") }

// What is pinned cannot be removed; what is not, can, and is fetched again.
func TestRemove(t *testing.T) {
	held, loose := newImage(1000), content(2000)
	c, dir := start(t, options{pins: pinning(cache.Pin{Digest: held.digest(), Firm: true})})
	held.fill(t, c)
	fetch(t, c, loose)
	c.LookAtPins(t.Context())
	for _, b := range append(held.layers, held.manifest) {
		if err := c.Remove(digest.FromBytes(b)); !errors.Is(err, cache.ErrPinned) || !here(c, b) {
			t.Errorf("what is pinned: %v", err)
		}
	}
	if err := c.Remove(digest.FromBytes(loose)); err != nil || here(c, loose) {
		t.Errorf("what is loose: %v", err)
	}
	if err := c.Remove(digest.FromBytes(loose)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is gone: %v", err)
	}
	if o := fetch(t, c, loose); o != cache.Fill {
		t.Errorf("asked for again it is a %v", o)
	}
	nothingWrong(t, c, dir)
}

// Whoever has content open reads it to its end after it was removed, and a fill that is
// under way is none of Remove's business.
func TestRemoveDisturbsNobody(t *testing.T) {
	c, dir := start(t, options{})
	read, arriving := content(2000), content(3000)
	fetch(t, c, read)
	b, err := c.Get(t.Context(), digest.FromBytes(read), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := c.Remove(digest.FromBytes(read)); err != nil {
		t.Error(err)
	}
	s, err := b.Section(t.Context(), 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if _, err := s.WriteTo(&got); err != nil || !bytes.Equal(got.Bytes(), read) {
		t.Errorf("whoever was reading it: %d bytes, %v", got.Len(), err)
	}
	release := make(chan struct{})
	src := &source{body: arriving, reader: func(_ int, r io.Reader) io.Reader {
		return io.MultiReader(io.LimitReader(r, 100), waiting{release}, r)
	}}
	f, err := c.Get(t.Context(), digest.FromBytes(arriving), src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := c.Remove(digest.FromBytes(arriving)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is still arriving: %v, want fs.ErrNotExist", err)
	}
	close(release)
	settled(c)
	if !here(c, arriving) {
		t.Error("what was arriving is not here")
	}
	nothingWrong(t, c, dir)
}

// Looking at what is stored is no use of it: what is looked at is evicted as if nobody
// had.
func TestLookingIsNoUse(t *testing.T) {
	clk := newClock()
	held := newImage(900)
	c, dir := start(t, options{max: 4500, now: clk.Now, pins: pinning(cache.Pin{Digest: held.digest(), Firm: true})})
	held.fill(t, c)
	first, second := content(1001), content(1002)
	for _, b := range [][]byte{first, second} {
		clk.advance(time.Hour)
		fetch(t, c, b)
	}
	c.LookAtPins(t.Context())
	clk.advance(time.Hour)
	d := digest.FromBytes(first)
	if size, held := c.Holds(d); size != 1001 || !held {
		t.Errorf("Holds = %d, %t", size, held)
	}
	if err := c.Verify(t.Context(), d); err != nil {
		t.Error(err)
	}
	f, err := c.OpenStored(d)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := c.Scrub(t.Context(), cache.ScrubOptions{}); err != nil {
		t.Error(err)
	}
	fetch(t, c, content(2000))
	if here(c, first) || !here(c, second) || !held.whole(c) {
		t.Errorf("the first is here: %t, the second: %t, what is pinned: %t", here(c, first), here(c, second), held.whole(c))
	}
	nothingWrong(t, c, dir)
}

// A pin of an index keeps the images that it names, and no others.
func TestAPinOfSomePlatforms(t *testing.T) {
	amd, arm := newImage(1000), newImage(1100)
	index, err := json.Marshal(map[string][]digest.Digest{"images": {amd.digest(), arm.digest()}})
	if err != nil {
		t.Fatal(err)
	}
	pin := cache.Pin{Digest: digest.FromBytes(index), Firm: true, Children: map[digest.Digest]bool{amd.digest(): true}}
	c, dir := start(t, options{max: 3000, pins: pinning(pin)})
	amd.fill(t, c)
	arm.fill(t, c)
	fetch(t, c, index)
	if !c.LookAtPins(t.Context()) {
		t.Fatal("the pins could not be looked at")
	}
	if got, want := c.Stats().PinnedBytes, int64(len(index)+len(amd.manifest)+1000); got != want {
		t.Errorf("%d bytes are pinned, want %d", got, want)
	}
	fetch(t, c, content(1500))
	if !amd.whole(c) || arm.whole(c) {
		t.Errorf("the image that is pinned is here: %v, the other: %v", amd.whole(c), arm.whole(c))
	}
	if err := c.FitsPinned([]digest.Digest{amd.digest()}, 1500); err != nil {
		t.Errorf("what fits: %v", err)
	}
	if err := c.FitsPinned(nil, 2000); !errors.Is(err, cache.ErrNoRoom) {
		t.Errorf("what does not: %v", err)
	}
	nothingWrong(t, c, dir)
}
