package cache_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"iter"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/cache"
)

// An image of a test: layers, and the manifest that lists them.
type image struct {
	layers   [][]byte
	manifest []byte
}

func newImage(sizes ...int) image {
	var img image
	var refs []digest.Digest
	for _, n := range sizes {
		l := content(n)
		img.layers, refs = append(img.layers, l), append(refs, digest.FromBytes(l))
	}
	b, err := json.Marshal(refs)
	if err != nil {
		panic(err)
	}
	img.manifest = b
	return img
}

func (i image) digest() digest.Digest { return digest.FromBytes(i.manifest) }

func (i image) fill(t *testing.T, c *cache.Cache) {
	t.Helper()
	for _, l := range i.layers {
		fetch(t, c, l)
	}
	if _, _, err := c.Manifest(t.Context(), i.digest(), &source{body: i.manifest}); err != nil {
		t.Fatal(err)
	}
}

// whole tells how much of the image is here.
func (i image) whole(c *cache.Cache) bool {
	for _, l := range i.layers {
		if !here(c, l) {
			return false
		}
	}
	return here(c, i.manifest)
}

// pinning yields the images that are pinned.
func pinning(pins ...cache.Pin) func(context.Context) iter.Seq2[cache.Pin, error] {
	return func(context.Context) iter.Seq2[cache.Pin, error] {
		return func(yield func(cache.Pin, error) bool) {
			for _, p := range pins {
				if !yield(p, nil) {
					return
				}
			}
		}
	}
}

// What is pinned firmly is never evicted, with everything below it, also after
// a restart; what is pinned softly goes when nothing else is left; what is not
// goes first. New content is passed on when nothing can go any more.
func TestPinsAreKeptInOrderOfTheirGrip(t *testing.T) {
	held, history, loose := newImage(1001, 1002), newImage(1011, 1012), newImage(1021, 1022)
	pins := pinning(cache.Pin{Digest: held.digest(), Firm: true}, cache.Pin{Digest: history.digest()})
	for _, restart := range []bool{false, true} {
		o := options{max: 8000, dir: t.TempDir()}
		if !restart {
			o.pins = pinning()
		}
		t.Run("fill", func(t *testing.T) {
			c, _ := start(t, o)
			for _, img := range []image{held, history, loose} {
				img.fill(t, c)
			}
		})
		o.pins = pins
		c, dir := start(t, o)
		if restart {
			c.Keep(held.digest(), true) // as often as one likes
		}
		fetch(t, c, content(2500))
		if !held.whole(c) || !history.whole(c) || loose.whole(c) {
			t.Errorf("after one more: held %t, history %t, loose %t", held.whole(c), history.whole(c), loose.whole(c))
		}
		if o := fetch(t, c, content(5700)); o != cache.Fill || history.whole(c) || !held.whole(c) {
			t.Errorf("nothing else is left: %v, history %t, held %t", o, history.whole(c), held.whole(c))
		}
		if o := fetch(t, c, content(7000)); o != cache.Pass || !held.whole(c) {
			t.Errorf("there is no room beside what is held: %v, held %t; want it passed on", o, held.whole(c))
		}
		nothingWrong(t, c, dir)
	}
}

// Keep pins at once, before anybody asks what is pinned.
func TestKeepPinsAtOnce(t *testing.T) {
	held := newImage(1001, 1002)
	c, _ := start(t, options{max: 4000, pins: pinning()})
	held.fill(t, c)
	c.Keep(held.digest(), true)
	for i := range 5 {
		fetch(t, c, content(1500+i))
	}
	if !held.whole(c) {
		t.Error("what is held was evicted")
	}
}

// In a cache that is full of history, what is pulled now does not evict itself:
// it is not known yet whether it will be history, too.
func TestWhatIsPulledNowStays(t *testing.T) {
	var pins []cache.Pin
	var history []image
	for i := range 5 {
		img := newImage(1001+10*i, 1002+10*i)
		history, pins = append(history, img), append(pins, cache.Pin{Digest: img.digest()})
	}
	dir := t.TempDir()
	t.Run("fill", func(t *testing.T) {
		c, _ := start(t, options{dir: dir})
		for _, img := range history {
			img.fill(t, c)
		}
	})
	c, _ := start(t, options{dir: dir, max: 11_200, pins: pinning(pins...)})
	pulled := newImage(1201, 1202, 1203)
	if _, _, err := c.Manifest(t.Context(), pulled.digest(), &source{body: pulled.manifest}); err != nil {
		t.Fatal(err)
	}
	for _, l := range pulled.layers {
		fetch(t, c, l)
	}
	if !pulled.whole(c) {
		t.Error("what was just pulled has evicted itself")
	}
}

// A layer of what is held that arrives after the hold began is not the first to
// go; and it is pinned when the hold is completed.
func TestLayersThatArriveAfterAHold(t *testing.T) {
	held := newImage(1001, 1002)
	c, _ := start(t, options{max: 5000, pins: pinning(cache.Pin{Digest: held.digest(), Firm: true})})
	fetch(t, c, held.layers[0])
	if _, _, err := c.Manifest(t.Context(), held.digest(), &source{body: held.manifest}); err != nil {
		t.Fatal(err)
	}
	c.Keep(held.digest(), true)
	fetch(t, c, held.layers[1])
	fetch(t, c, content(1500))
	if !held.whole(c) {
		t.Error("a layer that had just arrived was evicted")
	}
	c.Keep(held.digest(), true)
	for i := range 6 {
		fetch(t, c, content(1500+i))
	}
	if !held.whole(c) {
		t.Error("a layer of what is held was evicted")
	}
}

// When it cannot be found out what is pinned, nothing is evicted.
func TestNothingIsEvictedWhileThePinsAreUnknown(t *testing.T) {
	img := newImage(1001, 1002)
	dir := t.TempDir()
	t.Run("fill", func(t *testing.T) {
		c, _ := start(t, options{dir: dir})
		img.fill(t, c)
	})
	var asked atomic.Int64
	o := options{dir: dir, max: 3000, pins: func(context.Context) iter.Seq2[cache.Pin, error] {
		asked.Add(1)
		return func(yield func(cache.Pin, error) bool) { yield(cache.Pin{}, errors.New("database is locked")) }
	}}
	c, stop := startUnready(t, o)
	defer stop()
	for asked.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	for i := range 3 {
		fetch(t, c, content(1500+i))
	}
	if !img.whole(c) || c.Stats().EvictedBytes != 0 {
		t.Errorf("evicted %d bytes without knowing what is pinned", c.Stats().EvictedBytes)
	}
}

// Ensure returns when content is stored, and says when it cannot be.
func TestEnsure(t *testing.T) {
	c, dir := start(t, options{max: 10_000})
	body := content(3000)
	src := &source{body: body}
	for range 2 {
		if err := c.Ensure(t.Context(), digest.FromBytes(body), src); err != nil || !here(c, body) {
			t.Errorf("Ensure = %v, here %t", err, here(c, body))
		}
	}
	if src.opened() != 1 {
		t.Errorf("the source was opened %d times, want once", src.opened())
	}
	large := content(5_000_000)
	far := &source{body: large}
	for range 3 {
		if err := c.Ensure(t.Context(), digest.FromBytes(large), far); !errors.Is(err, cache.ErrNoRoom) {
			t.Errorf("content that does not fit: %v", err)
		}
	}
	if far.sent > 1_000_000 {
		t.Errorf("%d bytes were fetched to find out that there is no room", far.sent)
	}
	wrong := bytes.Clone(body)
	wrong[5] ^= 1
	other := content(3001)
	if err := c.Ensure(t.Context(), digest.FromBytes(other), &source{body: wrong}); !errors.Is(err, cache.ErrMismatch) {
		t.Errorf("wrong content: %v", err)
	}
	nothingWrong(t, c, dir)
}

// Presence tells whether an image is here, and Read what a piece of it says, from
// here alone if that is asked for; rot is noticed.
func TestPresenceAndRead(t *testing.T) {
	img := newImage(1001, 1002)
	c, dir := start(t, options{})
	if p := c.Presence(img.digest()); p != cache.Gone {
		t.Errorf("before: %s", p)
	}
	if _, err := c.Read(t.Context(), img.digest(), nil, 1<<20); err == nil {
		t.Error("what is not here was read from nowhere")
	}
	img.fill(t, c)
	if p := c.Presence(img.digest()); p != cache.Here {
		t.Errorf("all of it: %s", p)
	}
	layer := digest.FromBytes(img.layers[0])
	if b, err := c.Read(t.Context(), layer, nil, 1<<20); err != nil || !bytes.Equal(b, img.layers[0]) {
		t.Errorf("read %d bytes, %v", len(b), err)
	}
	if _, err := c.Read(t.Context(), layer, nil, 10); err == nil {
		t.Error("more was read than is allowed")
	}
	file := filepath.Join(dir, "blobs/sha256", layer.Encoded())
	if err := os.WriteFile(file, bytes.Repeat([]byte{'x'}, len(img.layers[0])), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(t.Context(), layer, nil, 1<<20); !errors.Is(err, cache.ErrMismatch) {
		t.Errorf("rotten content: %v", err)
	}
	if p := c.Presence(img.digest()); p != cache.Torn {
		t.Errorf("without a layer: %s", p)
	}
}
