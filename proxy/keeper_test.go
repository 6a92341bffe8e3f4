package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/cache"
	"tidemark/proxy"
	"tidemark/proxy/upstream/upstreamtest"
)

// until waits for something that happens behind an answer.
func until(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !happened(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in ten seconds this did not happen: %s", what)
		}
	}
}

// What a cooldown may serve one day is completed when upstream leaves it, for
// then upstream may forget it.
func TestWhatACooldownWillServeIsKept(t *testing.T) {
	clk, hour := newClock(), time.Hour
	m := newMirror(t, settings{kept: true, now: clk.Now, policy: policy(t, audit.RuleText{Match: "**", Mode: audit.Cooldown, Age: 10 * hour, Tenure: &hour})})
	a, x, y := upstreamtest.NewImage("a"), upstreamtest.NewImage("x"), upstreamtest.NewImage("y")
	m.hub.Push("library/app", "1", a)
	m.pull("app", "1", a)
	clk.advance(hour)
	m.hub.Push("library/app", "1", x)
	m.pull("app", "1", a)
	clk.advance(2 * hour)
	m.pull("app", "1", a)
	m.hub.Push("library/app", "1", y)
	clk.advance(time.Minute)
	m.pull("app", "1", a)
	until(t, "what upstream left was completed", func() bool { return m.cache.Presence(x.Manifest.Digest) == cache.Here })
	m.hub.Delete("library/app", x.Manifest.Digest.String())
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 404, Path: "/blobs/"})
	clk.advance(9 * hour)
	m.pull("app", "1", x)
}

// That somebody looks at a diff is no pull: nothing of it is kept.
func TestLookingAtADiffIsNoPull(t *testing.T) {
	m := newMirror(t, settings{policy: policy(t, holdAll), kept: true})
	idx, next := upstreamtest.NewIndex("layer"), upstreamtest.NewIndex("other layer")
	m.hub.PushIndex("library/multi", "1", idx)
	arm := idx.Images[1]
	m.get("/v2/multi/manifests/1")
	m.get("/v2/multi/manifests/" + arm.Manifest.Digest.String())
	m.hub.PushIndex("library/multi", "1", next)
	ref := audit.Ref{Upstream: "docker.io", Repository: "library/multi", Tag: "1"}
	if d, err := m.contents.Diff(t.Context(), ref, idx.Manifest.Digest, next.Manifest.Digest); err != nil || d.Tier != 2 {
		t.Fatalf("%+v, %v", d, err)
	}
	m.get("/v2/multi/manifests/1") // the hold begins
	until(t, "what clients pull was completed", func() bool { return m.cache.Presence(arm.Manifest.Digest) == cache.Here })
	if p := m.cache.Presence(idx.Images[0].Manifest.Digest); p != cache.Gone {
		t.Errorf("the image that nobody pulled is %s", p)
	}
}

// Of an index that nobody has pulled from, a hold keeps the images for this
// machine, whatever their variant; if there are none, all of them.
func TestHoldOfAnIndexThatNobodyPulled(t *testing.T) {
	for name, tt := range map[string]struct {
		arch string
		want []cache.Presence // of both images
	}{
		"for this machine, with a variant": {runtime.GOARCH + `","variant":"v8`, []cache.Presence{cache.Here, cache.Gone}},
		"for others":                       {"s390x", []cache.Presence{cache.Here, cache.Here}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMirror(t, settings{policy: policy(t, holdAll), kept: true})
			idx, next := upstreamtest.NewIndex("layer"), upstreamtest.NewIndex("other layer")
			body := strings.NewReplacer(`"architecture":"arm64"`, `"architecture":"riscv64"`, `"architecture":"amd64"`, `"architecture":"`+tt.arch+`"`).Replace(string(idx.Manifest.Body))
			idx.Manifest = upstreamtest.NewContent(idx.Manifest.MediaType, []byte(body))
			m.hub.PushIndex("library/multi", "1", idx)
			m.do("HEAD", "/v2/multi/manifests/1")
			m.hub.PushIndex("library/multi", "1", next)
			m.do("HEAD", "/v2/multi/manifests/1")
			until(t, "the images were completed", func() bool {
				return m.cache.Presence(idx.Images[0].Manifest.Digest) == tt.want[0] && m.cache.Presence(idx.Images[1].Manifest.Digest) == tt.want[1]
			})
		})
	}
}

// What is promised is found out again when the ledger could not be read, and one
// upstream that stalls does not hold up the others.
func TestKeeperGoesOn(t *testing.T) {
	m := newMirror(t, settings{policy: policy(t, holdAll)})
	slow, old := upstreamtest.NewImage("slow"), upstreamtest.NewImage("old app")
	for repo, img := range map[string]upstreamtest.Image{"slow": slow, "app": old} {
		m.hub.Push("library/"+repo, "1", img)
		m.get("/v2/" + repo + "/manifests/1")
		m.hub.Push("library/"+repo, "1", upstreamtest.NewImage("new"))
		m.get("/v2/" + repo + "/manifests/1")
	}
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Stall, Path: slow.Layers[0].Digest.String(), At: 1})
	var asked atomic.Int64
	k := proxy.NewKeeper(m.contents, func(ctx context.Context) iter.Seq2[audit.Tag, error] {
		if asked.Add(1) == 1 {
			return func(yield func(audit.Tag, error) bool) { yield(audit.Tag{}, errors.New("database is locked")) }
		}
		return m.store.EachTag(ctx, audit.TagQuery{Kept: true})
	}, zerolog.New(io.Discard))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- k.Run(ctx) }()
	until(t, "what is held was completed", func() bool { return m.cache.Presence(old.Manifest.Digest) == cache.Here })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// What a manifest calls a digest becomes neither a name of a file nor a panic.
func TestHostileDigests(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret.json")
	if err := os.WriteFile(secret, []byte(`{"config":{"User":"s3cret"},"rootfs":{"diff_ids":[]}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	m := newMirror(t, settings{dir: dir})
	img := upstreamtest.NewImage("a")
	for i, bad := range []string{"garbage", "sha256:../../secret.json", "sha256:", "../../secret.json:x", "md5:d41d8cd98f00b204e9800998ecf8427e"} {
		repo := fmt.Sprintf("app%d", i)
		m.hub.Push("library/"+repo, "1", img)
		m.pull(repo, "1", img)
		m.hub.PushManifest("library/"+repo, "1", upstreamtest.NewContent(img.Manifest.MediaType, fmt.Appendf(nil,
			`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":2,"urls":["https://x"]},"layers":[]}`, img.Manifest.MediaType, bad)))
		if a := m.do("HEAD", "/v2/"+repo+"/manifests/1"); a.status != 200 || a.header.Get("Docker-Content-Digest") != img.Manifest.Digest.String() {
			t.Errorf("%q: %d %v, want what was served before", bad, a.status, a.header)
		}
	}
	if _, err := os.Stat(secret); err != nil {
		t.Errorf("a file outside of the blobs is gone: %v", err)
	}
}

// Looking for an explanation leaves no trace that harms the pull it explains.
func TestExplanationHarmsNoPull(t *testing.T) {
	m := newMirror(t, settings{})
	idx, next := upstreamtest.NewIndex("layer"), upstreamtest.NewIndex("other layer")
	m.hub.PushIndex("library/multi", "1", idx)
	m.get("/v2/multi/manifests/1")
	m.get("/v2/multi/manifests/" + idx.Images[0].Manifest.Digest.String())
	m.hub.PushIndex("library/multi", "1", next)
	child := next.Images[0].Manifest.Digest.String()
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 404, Path: child}) // not at this edge yet
	if a := m.get("/v2/multi/manifests/1"); a.status != 200 {
		t.Fatal(a.status)
	}
	m.hub.Mend()
	if a := m.get("/v2/multi/manifests/" + child); a.status != 200 {
		t.Errorf("it is there upstream, and the client gets %d %s", a.status, a.body)
	}
}

// A manifest cannot keep a move off the record.
func TestNoManifestIsTooMuchForTheLedger(t *testing.T) {
	m := newMirror(t, settings{})
	img := upstreamtest.NewImage("x")
	m.hub.Push("library/app", "1", img)
	m.get("/v2/app/manifests/1")
	m.hub.PushManifest("library/app", "1", upstreamtest.NewContent(img.Manifest.MediaType, fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":"%s"}`, strings.Repeat("<", 12_000))))
	if a := m.do("HEAD", "/v2/app/manifests/1"); a.status != 200 || a.header.Get("Docker-Content-Digest") != img.Manifest.Digest.String() {
		t.Errorf("%d %v, want what was served before", a.status, a.header)
	}
	if err := m.ledger.Unwritable(); err != nil {
		t.Errorf("the ledger is said to be unwritable: %v", err)
	}
	m.hub.Push("library/app", "1", upstreamtest.NewImage("y"))
	m.get("/v2/app/manifests/1")
	if got := types(audittest.Check(t, m.store)); got != "[tag.first_seen tag.moved]" {
		t.Errorf("events are %s", got)
	}
}
