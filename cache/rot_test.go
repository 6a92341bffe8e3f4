package cache_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"tidemark/cache"
)

// A stored manifest is verified when it is read, and a blob that has another
// size than it was committed with is not what it was: both are fetched again.
func TestWhatTheDiskSpoiledIsFetchedAgain(t *testing.T) {
	c, dir := start(t, options{})
	layer, manifest := content(1000), []byte(`["`+digest.FromString("x").String()+`"]`)
	fetch(t, c, layer)
	fetch(t, c, manifest)
	spoil := func(body, with []byte) {
		path := filepath.Join(dir, "blobs/sha256", digest.FromBytes(body).Encoded())
		if err := os.WriteFile(path, with, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	spoil(layer, layer[:10])
	spoil(manifest, bytes.Replace(manifest, []byte("sha256"), []byte("sha257"), 1))
	src := &source{body: layer}
	if got, _, err := get(t.Context(), c, digest.FromBytes(layer), src); err != nil || !bytes.Equal(got, layer) || src.opened() != 1 {
		t.Errorf("a truncated blob: %d bytes, %v, fetched %d times", len(got), err, src.opened())
	}
	src = &source{body: manifest}
	if m, _, err := c.Manifest(t.Context(), digest.FromBytes(manifest), src); err != nil || !bytes.Equal(m.Body, manifest) || src.opened() != 1 {
		t.Errorf("a rotten manifest: %v, %v, fetched %d times", m, err, src.opened())
	}
	nothingWrong(t, c, dir)
}

// When others have filled the disk, what is here is not thrown away for content
// that would not fit nevertheless.
func TestDiskFilledByOthersCostsNothingThatIsHere(t *testing.T) {
	f := &faulty{free: 1 << 30, writable: -1}
	c, dir := start(t, options{free: 100_000, store: func(s cache.Store) cache.Store { f.Store = s; return f }})
	for i := range 10 {
		fetch(t, c, content(1000+i))
	}
	f.free = 1000
	if o := fetch(t, c, content(5000)); o != cache.Pass {
		t.Errorf("outcome %v, want pass", o)
	}
	if n := c.Stats().Blobs; n != 10 {
		t.Errorf("%d blobs are left of 10", n)
	}
	nothingWrong(t, c, dir)
}

// Nothing is evicted for content that would not fit beside what is pinned and what is
// arriving, whoever asks for the room.
func TestWhatCannotFitBesideWhatStaysCostsNothing(t *testing.T) {
	held := newImage(3000)
	c, dir := start(t, options{max: 10_000, pins: pinning(cache.Pin{Digest: held.digest(), Firm: true})})
	held.fill(t, c)
	loose := content(1500)
	fetch(t, c, loose)
	c.LookAtPins(t.Context())
	release := make(chan struct{})
	arriving := content(4000)
	b, err := c.Get(t.Context(), digest.FromBytes(arriving), &source{body: arriving, reader: func(_ int, r io.Reader) io.Reader {
		return io.MultiReader(io.LimitReader(r, 100), waiting{release}, r)
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	large := content(5000)
	if _, err := c.Intake(t.Context(), []cache.Reference{{Digest: digest.FromBytes(large), Size: 5000}}); !errors.Is(err, cache.ErrNoRoom) {
		t.Errorf("Intake = %v, want ErrNoRoom", err)
	}
	if got, o, err := get(t.Context(), c, digest.FromBytes(large), &source{body: large}); o != cache.Pass || err != nil || !bytes.Equal(got, large) {
		t.Errorf("a client got %d bytes, %v, %v; want them passed on", len(got), o, err)
	}
	if !here(c, loose) || !held.whole(c) {
		t.Errorf("what is loose is here: %t, what is pinned: %t", here(c, loose), held.whole(c))
	}
	close(release)
	nothingWrong(t, c, dir)
}

// A range of content for which there is no room costs the source that range.
func TestUncachedRangeIsOnlyThatRange(t *testing.T) {
	c, _ := start(t, options{max: 1000})
	body := content(4 << 20)
	src := &source{body: body}
	got, o, err := getRange(t.Context(), c, digest.FromBytes(body), src, 500, 100)
	if err != nil || o != cache.Pass || !bytes.Equal(got, body[500:600]) || src.sent > 1<<20 {
		t.Errorf("%d bytes, %v, %v; the source sent %d", len(got), o, err, src.sent)
	}
}
