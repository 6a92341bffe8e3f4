package proxy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/sqlite"
	"tidemark/cache"
	"tidemark/cache/disk"
	"tidemark/proxy"
	"tidemark/proxy/oci"
	"tidemark/proxy/route"
	"tidemark/proxy/upstream"
	"tidemark/proxy/upstream/upstreamtest"
)

// A mirror is the registry in front of a fake docker.io and a fake ghcr.io,
// with everything between the socket and the disk real.
type mirror struct {
	t     *testing.T
	hub   *upstreamtest.Registry
	ghcr  *upstreamtest.Registry
	cache *cache.Cache
	store *sqlite.Store
	url   string

	up       *upstream.Upstream // docker.io as the mirror sees it
	ledger   *audit.Ledger
	contents *proxy.Contents
	keeper   *proxy.Keeper
	handler  *proxy.Handler
}

type settings struct {
	policy   *audit.Policy
	now      func() time.Time
	kept     bool // a keeper runs
	offline  bool
	dir      string
	ttl      time.Duration
	max      int64
	prefetch bool
	silence  time.Duration // after which upstream is taken for dead

	hubAt             string // docker.io is there instead
	patience          time.Duration
	passthrough, push bool
	refuseGaps        bool
	shared            bool                 // ghcr.io is, with credentials
	login             upstream.Credentials // of ghcr.io
}

func newMirror(t *testing.T, s settings) *mirror {
	t.Helper()
	m := &mirror{t: t, hub: upstreamtest.New(), ghcr: upstreamtest.New()}
	t.Cleanup(m.hub.Close)
	t.Cleanup(m.ghcr.Close)
	m.start(s)
	return m
}

// start starts the mirror, perhaps on the folder of an earlier one.
func (m *mirror) start(s settings) {
	m.t.Helper()
	if s.dir == "" {
		s.dir = m.t.TempDir()
	}
	if s.max == 0 {
		s.max = 1 << 30
	}
	if s.silence == 0 {
		s.silence = 500 * time.Millisecond
	}
	d, err := disk.Open(s.dir)
	if err != nil {
		m.t.Fatal(err)
	}
	m.store, err = sqlite.Open(m.t.Context(), filepath.Join(s.dir, "audit.db"), "tidemark.test/log")
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { m.store.Close() })
	log := zerolog.New(io.Discard)
	m.cache = cache.New(cache.Options{Store: d, Budget: func(int64) int64 { return s.max }, Describe: describe, Log: log})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = m.cache.Run(ctx) }()
	m.t.Cleanup(func() { cancel(); <-done })
	for !m.cache.Stats().Ready {
		time.Sleep(time.Millisecond)
	}
	table, err := route.NewTable("docker.io", []route.Upstream{{Name: "docker.io"}, {Name: "ghcr.io", Hosts: []string{"mirror.test"}}})
	if err != nil {
		m.t.Fatal(err)
	}
	hub := m.hub.URL()
	if s.hubAt != "" {
		if hub, err = url.Parse(s.hubAt); err != nil {
			m.t.Fatal(err)
		}
	}
	note := func(upstream, repository string, list []audit.Referrer) {
		if err := m.store.AddReferrers(context.Background(), upstream, repository, list); err != nil {
			m.t.Error(err)
		}
	}
	upstreams := map[string]*upstream.Upstream{
		"docker.io": upstream.New(upstream.Options{Name: "docker.io", Endpoints: []*url.URL{hub}, Offline: s.offline, HeaderTimeout: s.silence, IdleTimeout: s.silence}),
		"ghcr.io":   upstream.New(upstream.Options{Name: "ghcr.io", Endpoints: []*url.URL{m.ghcr.URL()}, Credentials: s.login}),
	}
	m.up = upstreams["docker.io"]
	m.contents = proxy.NewContents(upstreams, m.cache, note, m.store.History)
	m.keeper = proxy.NewKeeper(m.contents, func(ctx context.Context) iter.Seq2[audit.Tag, error] {
		return m.store.EachTag(ctx, audit.TagQuery{Kept: true})
	}, log)
	if s.kept {
		kept := make(chan struct{})
		go func() { defer close(kept); _ = m.keeper.Run(ctx) }()
		m.t.Cleanup(func() { cancel(); <-kept })
	}
	m.ledger = audit.New(audit.Options{
		Store: m.store, Memory: m.store, TTL: s.ttl, Log: log, Policy: s.policy, Now: s.now, Compare: m.contents.Compare,
		Recorded: func(_ int64, e audit.Event) { m.keeper.Recorded(e) },
	})
	h := proxy.New(proxy.Options{
		Table: table, Upstreams: upstreams, Ledger: m.ledger, TTL: s.ttl,
		Passthrough: s.passthrough, Shared: map[string]bool{"ghcr.io": s.shared}, Push: s.push, Patience: s.patience,
		Cache: m.cache, Prefetch: s.prefetch, KnownTags: m.store.TagNames, History: m.store.History, Repositories: m.store.Repositories,
		Chronicle: m.store.Chronicle, KnownTagsAt: m.store.TagNamesAt, RefuseGaps: s.refuseGaps, Now: s.now,
		KnownReferrers: m.store.Referrers, NoteReferrers: note,
	})
	m.handler = h
	srv := httptest.NewServer(h)
	m.t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	m.url = srv.URL
}

// view is the address of a listener that is bound to a moment.
func (m *mirror) view(at audit.Moment) string {
	srv := httptest.NewServer(m.handler.View(at))
	m.t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	return srv.URL
}

func describe(b []byte) (cache.Description, error) {
	d, err := oci.Describe(b)
	out := cache.Description{MediaType: d.MediaType, Index: d.Index}
	for _, r := range d.Refers {
		out.Refers = append(out.Refers, cache.Reference{Digest: r.Digest, Size: r.Size})
	}
	return out, err
}

type answer struct {
	status int
	header http.Header
	body   []byte
	err    error // of reading the body
}

func (m *mirror) do(method, path string, headers ...string) answer {
	m.t.Helper()
	req, err := http.NewRequest(method, m.url+path, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		if k == "Host" {
			req.Host = v
		}
		req.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, body, err}
}

func (m *mirror) get(path string, headers ...string) answer {
	m.t.Helper()
	return m.do("GET", path, headers...)
}

// settled waits until no fill runs.
func (m *mirror) settled() {
	for len(m.cache.Stats().Fills) > 0 {
		time.Sleep(time.Millisecond)
	}
}

// pull pulls an image the way Docker does, and checks every byte.
func (m *mirror) pull(repo, tag string, want upstreamtest.Image) {
	m.t.Helper()
	head := m.do("HEAD", "/v2/"+repo+"/manifests/"+tag)
	if d := head.header.Get("Docker-Content-Digest"); head.status != 200 || d != want.Manifest.Digest.String() {
		m.t.Fatalf("HEAD %s:%s = %d %s, want %s", repo, tag, head.status, d, want.Manifest.Digest)
	}
	man := m.get("/v2/" + repo + "/manifests/" + want.Manifest.Digest.String())
	if !bytes.Equal(man.body, want.Manifest.Body) || man.header.Get("Content-Type") != want.Manifest.MediaType {
		m.t.Fatalf("manifest is %d %s %s", man.status, man.header, man.body)
	}
	for _, c := range append([]upstreamtest.Content{want.Config}, want.Layers...) {
		if b := m.get("/v2/" + repo + "/blobs/" + c.Digest.String()); !bytes.Equal(b.body, c.Body) {
			m.t.Fatalf("blob %s is %d with %d bytes, %v", c.Digest, b.status, len(b.body), b.err)
		}
	}
}

func (a answer) code(t *testing.T) string {
	t.Helper()
	var e struct {
		Errors []struct {
			Code, Message string
			Detail        struct {
				Upstream string
				Status   int
			}
		}
	}
	if err := json.Unmarshal(a.body, &e); err != nil || len(e.Errors) != 1 || e.Errors[0].Message == "" {
		t.Errorf("error body is %q, %v", a.body, err)
		return ""
	}
	return e.Errors[0].Code
}

// The main job: the second pull costs no blob request, a pull without upstream
// works, a move is served and on the record.
func TestPullAgainWithoutUpstreamAndAfterAMove(t *testing.T) {
	dir := t.TempDir()
	m := newMirror(t, settings{dir: dir, prefetch: true})
	old, moved := upstreamtest.NewImage("base", "app 1"), upstreamtest.NewImage("base", "app 2")
	m.hub.Push("library/app", "1", old)
	m.pull("app", "1", old)
	m.settled()
	m.hub.Reset()
	m.pull("library/app", "1", old)
	if n := m.hub.Count("", "/blobs/"); n != 0 {
		t.Errorf("the second pull asked for %d blobs upstream, want none", n)
	}
	if n := m.hub.Count("GET", ""); n != 0 {
		t.Errorf("the second pull made %d GETs upstream, want HEADs only", n)
	}
	m.hub.Push("library/app", "1", moved)
	m.pull("app", "1", moved)
	if n := m.hub.Count("GET", "/blobs/"+moved.Layers[0].Digest.String()); n != 0 {
		t.Errorf("the layer both images have was fetched again")
	}
	events := audittest.Check(t, m.store)
	if len(events) != 2 || events[1].Type != audit.Moved || events[1].Old.Digest != old.Manifest.Digest || events[1].New.Digest != moved.Manifest.Digest {
		t.Errorf("events are %+v", events)
	}
	m.settled()
	m.hub.Close()
	m.pull("app", "1", moved)
	m.start(settings{dir: dir}) // and after a restart
	m.pull("app", "1", moved)
	if a := m.do("HEAD", "/v2/app/manifests/1"); !strings.Contains(a.header.Get("Cache-Status"), "fwd=stale") {
		t.Errorf("Cache-Status is %q, want it to say stale", a.header.Get("Cache-Status"))
	}
	audittest.Check(t, m.store)
}

// Manifests are served byte for byte, with upstream's media type, an index and
// its children too, and an unchanged one is 304.
func TestManifestsAreServedByteForByte(t *testing.T) {
	m := newMirror(t, settings{ttl: time.Minute})
	idx := upstreamtest.NewIndex("layer")
	m.hub.PushIndex("library/app", "1", idx)
	odd := upstreamtest.NewContent(oci.DockerManifestList, []byte("{ \"schemaVersion\":2,\n\n\t\"mediaType\": \"application/vnd.docker.distribution.manifest.list.v2+json\", \"manifests\": [] }\n\n"))
	m.hub.PushManifest("library/app", "odd", odd)
	for _, tt := range []struct {
		ref  string
		want upstreamtest.Content
	}{{"1", idx.Manifest}, {idx.Images[1].Manifest.Digest.String(), idx.Images[1].Manifest}, {"odd", odd}} {
		for range 2 {
			a := m.get("/v2/library/app/manifests/" + tt.ref)
			if a.status != 200 || !bytes.Equal(a.body, tt.want.Body) || a.header.Get("Content-Type") != tt.want.MediaType ||
				a.header.Get("Docker-Content-Digest") != tt.want.Digest.String() || a.header.Get("Content-Length") != fmt.Sprint(len(tt.want.Body)) {
				t.Errorf("%s: %d %v %q", tt.ref, a.status, a.header, a.body)
			}
			again := m.get("/v2/library/app/manifests/"+tt.ref, "If-None-Match: "+a.header.Get("Etag"))
			if again.status != 304 || len(again.body) != 0 {
				t.Errorf("%s: If-None-Match = %d with %d bytes, want 304", tt.ref, again.status, len(again.body))
			}
		}
	}
	if a := m.get("/v2/library/app/manifests/1"); a.header.Get("Tidemark-Log-Index") != "0" || a.header.Get("Cache-Control") != "" {
		t.Errorf("headers of a tag are %v", a.header)
	}
	if a := m.get("/v2/library/app/manifests/" + odd.Digest.String()); !strings.Contains(a.header.Get("Cache-Control"), "immutable") || a.header.Get("Cache-Status") != "tidemark; hit" {
		t.Errorf("headers of a digest are %v", a.header)
	}
}

// All names of a repository lead to the same upstream, ledger and bytes.
func TestOneAddressForEveryRegistry(t *testing.T) {
	m := newMirror(t, settings{ttl: time.Minute})
	hub, ghcr := upstreamtest.NewImage("hub"), upstreamtest.NewImage("ghcr")
	m.hub.Push("library/app", "1", hub)
	m.ghcr.Push("org/app", "1", ghcr)
	for _, tt := range []struct {
		path    string
		headers []string
		want    digest.Digest
	}{
		{"/v2/app/manifests/1", nil, hub.Manifest.Digest},
		{"/v2/library/app/manifests/1", nil, hub.Manifest.Digest},
		{"/v2/docker.io/app/manifests/1", nil, hub.Manifest.Digest},
		{"/v2/docker.io/library/app/manifests/1?ns=docker.io", nil, ""},
		{"/v2/library/app/manifests/1?ns=docker.io", nil, hub.Manifest.Digest},
		{"/v2/ghcr.io/org/app/manifests/1", nil, ghcr.Manifest.Digest},
		{"/v2/org/app/manifests/1?ns=ghcr.io", nil, ghcr.Manifest.Digest},
		{"/v2/org/app/manifests/1", []string{"Host: ghcr.io"}, ghcr.Manifest.Digest},
		{"/v2/org/app/manifests/1", []string{"Host: mirror.test:5050"}, ghcr.Manifest.Digest},
		{"/v2/library/app/manifests/1?ns=docker.io", []string{"Host: ghcr.io"}, hub.Manifest.Digest},
	} {
		a := m.get(tt.path, tt.headers...)
		if got := digest.Digest(a.header.Get("Docker-Content-Digest")); got != tt.want {
			t.Errorf("%s %v = %d %s, want %s", tt.path, tt.headers, a.status, got, tt.want)
		}
		if ns := a.header.Get("OCI-Namespace"); strings.Contains(tt.path, "ns=") && !strings.HasSuffix(tt.path, ns) {
			t.Errorf("%s: OCI-Namespace is %q", tt.path, ns)
		}
	}
	if n := len(audittest.Check(t, m.store)); n != 2 {
		t.Errorf("%d refs were seen for the first time, want 2", n)
	}
}

// What is malformed is refused with the right code; nothing is written and
// nothing is dialled for it.
func TestBadInputIsRefusedAtOnce(t *testing.T) {
	dir := t.TempDir()
	m := newMirror(t, settings{dir: dir})
	sha := "sha256:" + strings.Repeat("a", 64)
	before := tree(t, dir)
	for _, tt := range []struct {
		method, path string
		headers      []string
		status       int
		code         string
	}{
		{"GET", "/v2/UPPER/manifests/1", nil, 400, "NAME_INVALID"},
		{"GET", "/v2/../../etc/passwd/manifests/1", nil, 400, "NAME_INVALID"},
		{"GET", "/v2/%2e%2e/%2e%2e/manifests/1", nil, 400, "NAME_INVALID"},
		{"GET", "/v2/a/..%2f..%2fb/blobs/" + sha, nil, 400, "NAME_INVALID"},
		{"GET", "/v2/a//b/manifests/1", nil, 400, "NAME_INVALID"},
		{"GET", "/v2/" + strings.Repeat("a", 256) + "/manifests/1", nil, 400, "NAME_INVALID"},
		{"GET", "/v2/app/manifests/-1", nil, 400, "TAG_INVALID"},
		{"GET", "/v2/app/manifests/..%2f..%2fx", nil, 404, "UNSUPPORTED"},
		{"GET", "/v2/app/manifests/" + strings.Repeat("x", 129), nil, 400, "TAG_INVALID"},
		{"GET", "/v2/app/manifests/sha256:abc", nil, 400, "DIGEST_INVALID"},
		{"GET", "/v2/app/manifests/md5:" + strings.Repeat("a", 32), nil, 400, "DIGEST_INVALID"},
		{"GET", "/v2/app/blobs/sha256:" + strings.Repeat("Z", 64), nil, 400, "DIGEST_INVALID"},
		{"GET", "/v2/app/blobs/sha256:..%2f..%2faudit.db", nil, 404, "UNSUPPORTED"},
		{"GET", "/v2/app/blobs/latest", nil, 400, "DIGEST_INVALID"},
		{"GET", "/v2/app/blobs/" + sha, []string{"Range: bytes=x-y"}, 400, "UNSUPPORTED"},
		{"GET", "/v2/app/blobs/" + sha, []string{"Range: bytes=5-2"}, 416, "UNSUPPORTED"},
		{"GET", "/v2/app/blobs/" + sha, []string{"Range: bytes=-"}, 400, "UNSUPPORTED"},
		{"GET", "/v2/app/blobs/" + sha, []string{"Range: bytes=99999999999999999999-"}, 400, "UNSUPPORTED"},
		{"GET", "/v2/app/manifests/1?ns=evil.example", nil, 404, "NAME_UNKNOWN"},
		{"GET", "/v2/app/manifests/1?ns=http://127.0.0.1:1/", nil, 404, "NAME_UNKNOWN"},
		{"GET", "/v2/app/manifests/1?ns=", nil, 404, "NAME_UNKNOWN"},
		{"GET", "/v2/app/manifests/1?ns=%zz", nil, 400, "UNSUPPORTED"},
		{"GET", "/v2/evil.example/app/manifests/1", nil, 404, "NAME_UNKNOWN"},
		{"GET", "/v2/app/tags/list?n=many", nil, 400, "UNSUPPORTED"},
		{"GET", "/v2/app/unknown/1", nil, 404, "UNSUPPORTED"},
		{"GET", "/", nil, 404, "UNSUPPORTED"},
		{"POST", "/v2/", nil, 405, "UNSUPPORTED"},
		{"PUT", "/v2/app/manifests/1", nil, 405, "UNSUPPORTED"},
		{"POST", "/v2/app/blobs/uploads/", nil, 405, "UNSUPPORTED"},
		{"DELETE", "/v2/app/manifests/" + sha, nil, 405, "UNSUPPORTED"},
	} {
		a := m.do(tt.method, tt.path, tt.headers...)
		if a.status != tt.status || a.code(t) != tt.code {
			t.Errorf("%s %s %v = %d %s, want %d %s", tt.method, tt.path, tt.headers, a.status, a.body, tt.status, tt.code)
		}
	}
	if n := len(m.hub.Requests()) + len(m.ghcr.Requests()); n != 0 {
		t.Errorf("upstreams were asked %d times, want never", n)
	}
	if after := tree(t, dir); after != before {
		t.Errorf("the data folder was\n%sand is\n%s", before, after)
	}
}

// tree lists a folder, but for what SQLite does in its own files.
func tree(t *testing.T, dir string) string {
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if !strings.Contains(path, "audit.db") {
			fmt.Fprintln(&b, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
