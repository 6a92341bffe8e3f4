package cache_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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
