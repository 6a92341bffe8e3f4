package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/cache"
	"tidemark/proxy"
	"tidemark/proxy/upstream/upstreamtest"
)

func quietly(digest.Digest, int64, int64) {}

var app1 = audit.Ref{Upstream: "docker.io", Repository: "library/app", Tag: "1"}

// What is warmed is complete afterwards, with what refers to it, and costs upstream
// each piece once; the second time nothing. Platforms narrow it.
func TestWarm(t *testing.T) {
	m := newMirror(t, settings{})
	idx := upstreamtest.NewIndex("base", "app")
	m.hub.PushIndex("library/app", "1", idx)
	sig := artifact("signature")
	m.hub.PushBlobs(upstreamtest.NewContent("", []byte("{}")))
	m.hub.Refer("library/app", idx.Manifest.Digest, "application/sig", sig)
	var told []int64
	half, err := m.contents.Warm(t.Context(), m.ledger, proxy.Want{Ref: app1}, []string{"linux/amd64"}, func(_ digest.Digest, have, total int64) { told = append(told, have, total) })
	if err != nil || !half.Image.Complete() || len(half.Image.Platforms) != 1 || half.Image.Platforms[0].Platform != "linux/amd64" || half.Filled == 0 || len(told) == 0 {
		t.Fatalf("one platform: %+v, %v, told %v", half, err, told)
	}
	if all, err := m.contents.Image(t.Context(), idx.Manifest.Digest, nil, false); err != nil || all.Complete() || len(all.Platforms) != 2 || len(all.Platforms[1].Missing) == 0 {
		t.Errorf("both: %+v, %v", all, err)
	}
	whole, err := m.contents.Warm(t.Context(), m.ledger, proxy.Want{Ref: app1}, nil, quietly)
	if err != nil || !whole.Image.Complete() || len(whole.Image.Platforms) != 2 {
		t.Fatalf("both: %+v, %v", whole, err)
	}
	seen := make(map[string]int)
	for _, q := range m.hub.Requests() {
		if seen[q.Method+q.Path]++; q.Method == "GET" && strings.Contains(q.Path, "/blobs/") && seen[q.Method+q.Path] > 1 {
			t.Errorf("%s was fetched twice", q.Path)
		}
	}
	if m.cache.Presence(sig.Digest) != cache.Here {
		t.Error("what refers to it is not here")
	}
	m.hub.Reset()
	again, err := m.contents.Warm(t.Context(), m.ledger, proxy.Want{Ref: app1}, nil, quietly)
	if err != nil || again.Filled != 0 || m.hub.Count("", "/blobs/") != 0 {
		t.Errorf("again: %+v, %v, %d blobs were asked for", again, err, m.hub.Count("", "/blobs/"))
	}
	byDigest, err := m.contents.Warm(t.Context(), m.ledger, proxy.Want{Ref: audit.Ref{Upstream: "docker.io", Repository: "library/app"}, Digest: idx.Manifest.Digest}, nil, quietly)
	if err != nil || !byDigest.Image.Complete() {
		t.Errorf("by digest: %+v, %v", byDigest, err)
	}
	if events := audittest.Check(t, m.store); len(events) != 1 || events[0].Evidence.Trigger != "warm" {
		t.Errorf("events: %+v", events)
	}
	if _, err := m.contents.Warm(t.Context(), m.ledger, proxy.Want{Ref: app1}, []string{"windows/amd64"}, quietly); err == nil || !strings.Contains(err.Error(), "linux/amd64, linux/arm64") {
		t.Errorf("a platform that there is not: %v; want those that there are", err)
	}
}

// A warming that is interrupted, or whose upstream breaks, keeps what it has got: the
// next one asks only for the rest.
func TestWarmGoesOn(t *testing.T) {
	m := newMirror(t, settings{})
	img := upstreamtest.NewImage("one", "two", "three")
	m.hub.Push("library/app", "1", img)
	last := img.Layers[2].Digest.String()
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 403, Path: last})
	w, err := m.contents.Warm(t.Context(), m.ledger, proxy.Want{Ref: app1}, nil, quietly)
	if err == nil || !strings.Contains(err.Error(), last) || w.Image.Complete() {
		t.Fatalf("%+v, %v; want it to say what is missing", w, err)
	}
	m.hub.Mend()
	m.settled()
	missing := len(w.Image.Platforms[0].Missing)
	m.hub.Reset()
	if w, err = m.contents.Warm(t.Context(), m.ledger, proxy.Want{Ref: app1}, nil, quietly); err != nil || !w.Image.Complete() {
		t.Errorf("again: %+v, %v", w, err)
	}
	if n := m.hub.Count("GET", "/blobs/"); n > missing {
		t.Errorf("%d blobs were asked for, %d were missing", n, missing)
	}
}

// tagsOf are all that the mirror knows.
func (m *mirror) tags(ctx context.Context, q audit.TagQuery) iter.Seq2[audit.Tag, error] {
	return m.store.EachTag(ctx, q)
}

// A scrub finds what the disk has spoiled or somebody has deleted, fetches it again from where it came from,
// and has it on the record; what nobody has any more is removed.
func TestScrubRefills(t *testing.T) {
	dir := t.TempDir()
	m := newMirror(t, settings{dir: dir})
	img, gone := upstreamtest.NewImage("kept"), upstreamtest.NewImage("gone")
	m.hub.Push("library/app", "1", img)
	m.hub.Push("library/gone", "1", gone)
	m.pull("app", "1", img)
	m.pull("gone", "1", gone)
	m.settled()
	m.hub.Delete("library/gone", gone.Manifest.Digest.String())
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 404, Path: gone.Layers[0].Digest.String()})
	for _, c := range []upstreamtest.Content{img.Layers[0], img.Manifest, gone.Layers[0]} {
		wrong := bytes.Clone(c.Body)
		wrong[0] ^= 1
		if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", c.Digest.Encoded()), wrong, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "blobs/sha256", img.Config.Digest.Encoded())); err != nil {
		t.Fatal(err)
	}
	s := proxy.NewScrubber(proxy.ScrubOptions{Contents: m.contents, Ledger: m.ledger, Memory: m.store, Tags: m.tags, Log: zerolog.New(io.Discard)})
	before := len(audittest.Check(t, m.store))
	report, findings, err := s.Scrub(t.Context(), 0, func(cache.ScrubReport) {})
	if err != nil || report.Checked != 6 || len(findings) != 4 {
		t.Fatalf("%+v, %+v, %v", report, findings, err)
	}
	got := make(map[digest.Digest]string)
	for _, f := range findings {
		got[f.Digest] = f.Action
	}
	want := map[digest.Digest]string{img.Layers[0].Digest: proxy.Refilled, img.Manifest.Digest: proxy.Refilled, img.Config.Digest: proxy.Refilled, gone.Layers[0].Digest: proxy.Removed}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("found %v, want %v", got, want)
	}
	events := audittest.Check(t, m.store)[before:]
	if len(events) != 4 {
		t.Fatalf("%d events, want one for each", len(events))
	}
	for _, e := range events {
		if e.Type != audit.Action || e.Operator.Action != "scrub" || e.Operator.New != want[e.Operator.Digest] {
			t.Errorf("recorded %+v", e.Operator)
		}
	}
	m.hub.Reset()
	m.pull("app", "1", img)
	if n := m.hub.Count("GET", ""); n != 0 {
		t.Errorf("after that the image was asked for %d times", n)
	}
	if _, findings, err := s.Scrub(t.Context(), 0, func(cache.ScrubReport) {}); err != nil || len(findings) != 0 {
		t.Errorf("again: %+v, %v", findings, err)
	}
}

// A scheduled scrub is made when it is due, once, also over restarts; one that was
// interrupted goes on after what it had looked at.
func TestScrubIsMadeWhenItIsDue(t *testing.T) {
	dir := t.TempDir()
	m := newMirror(t, settings{dir: dir})
	img := upstreamtest.NewImage("layer")
	m.hub.Push("library/app", "1", img)
	m.pull("app", "1", img)
	m.settled()
	memory := &notes{}
	run := func(every time.Duration, until func() bool) {
		t.Helper()
		s := proxy.NewScrubber(proxy.ScrubOptions{Contents: m.contents, Ledger: m.ledger, Memory: memory, Tags: m.tags, Every: every, Log: zerolog.New(io.Discard)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		for deadline := time.Now().Add(10 * time.Second); !until(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("it was not made")
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	done := func() bool { v, _ := memory.Recall(t.Context(), "scrub done"); return v != "" }
	run(24*time.Hour, done)
	first := memory.written.Load()
	run(24*time.Hour, func() bool { return true })
	run(0, func() bool { return true })
	if n := memory.written.Load(); n != first {
		t.Errorf("another was made: %d notes, then %d", first, n)
	}
	m.hub.Close()
	layer := img.Layers[0].Digest
	if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", layer.Encoded()), []byte("wrong"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, from := range []string{"sha256:ffff", ""} {
		memory.of = map[string]string{"scrub from": from}
		run(24*time.Hour, done)
		if _, held := m.cache.Holds(layer); held != (from != "") {
			t.Errorf("after a pass that began after %q it is here: %v", from, held)
		}
	}
}

// What is removed is what nobody else needs, and what is not pinned.
func TestRemoveKeepsWhatOthersNeed(t *testing.T) {
	m := newMirror(t, settings{})
	a, b := upstreamtest.NewImage("base", "a"), upstreamtest.NewImage("base", "b")
	idx := upstreamtest.NewIndex("multi")
	m.hub.Push("library/app", "1", a)
	m.hub.Push("library/app", "2", b)
	m.hub.PushIndex("library/multi", "1", idx)
	m.pull("app", "1", a)
	m.pull("app", "2", b)
	multi := audit.Ref{Upstream: "docker.io", Repository: "library/multi", Tag: "1"}
	if _, err := m.contents.Warm(t.Context(), m.ledger, proxy.Want{Ref: multi}, nil, quietly); err != nil {
		t.Fatal(err)
	}
	m.settled()
	taken, err := m.contents.Remove(t.Context(), a.Manifest.Digest, nil, m.tags(t.Context(), audit.TagQuery{}))
	if err != nil || len(taken.Digests) == 0 || len(taken.Kept) == 0 {
		t.Fatalf("%+v, %v", taken, err)
	}
	if m.cache.Presence(a.Manifest.Digest) != cache.Gone || m.cache.Presence(a.Layers[1].Digest) != cache.Gone || m.cache.Presence(b.Manifest.Digest) != cache.Here {
		t.Errorf("of what was removed %s and %s are left, of the other %s", m.cache.Presence(a.Manifest.Digest), m.cache.Presence(a.Layers[1].Digest), m.cache.Presence(b.Manifest.Digest))
	}
	if _, err := m.contents.Remove(t.Context(), a.Manifest.Digest, nil, m.tags(t.Context(), audit.TagQuery{})); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("again: %v", err)
	}
	if _, err := m.contents.Remove(t.Context(), idx.Manifest.Digest, []string{"linux/arm64"}, m.tags(t.Context(), audit.TagQuery{})); err != nil {
		t.Fatal(err)
	}
	for platform, complete := range map[string]bool{"linux/amd64": true, "linux/arm64": false} {
		if im, err := m.contents.Image(t.Context(), idx.Manifest.Digest, []string{platform}, true); err != nil || im.Complete() != complete {
			t.Errorf("%s: %+v, %v", platform, im, err)
		}
	}
	m.pull("app", "1", a) // and the next pull has it again
}

// notes are what is remembered, and how often something was written down.
type notes struct {
	mu      sync.Mutex
	of      map[string]string
	written atomic.Int64
}

func (n *notes) Recall(_ context.Context, key string) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.of[key], nil
}

func (n *notes) Remember(_ context.Context, key, value string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.of == nil {
		n.of = make(map[string]string)
	}
	n.of[key] = value
	n.written.Add(1)
	return nil
}
