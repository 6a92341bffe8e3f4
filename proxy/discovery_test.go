package proxy_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/audit"
	"tidemark/proxy/oci"
	"tidemark/proxy/upstream/upstreamtest"
)

// referrers reads a list of referrers by their digests.
func (m *mirror) referrers(subject digest.Digest, query string) (list []string, a answer) {
	m.t.Helper()
	a = m.get("/v2/library/app/referrers/" + subject.String() + query)
	var index ocispec.Index
	if a.status != 200 || a.header.Get("Content-Type") != ocispec.MediaTypeImageIndex || json.Unmarshal(a.body, &index) != nil || index.SchemaVersion != 2 || index.Manifests == nil {
		m.t.Fatalf("referrers%s = %d %v %s, want an index", query, a.status, a.header, a.body)
	}
	for _, d := range index.Manifests {
		list = append(list, d.Digest.String())
	}
	return list, a
}

// artifact is a manifest of some kind.
func artifact(text string) upstreamtest.Content {
	return upstreamtest.NewContent(ocispec.MediaTypeImageManifest, fmt.Appendf(nil,
		`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[],"annotations":{"is":%q}}`,
		ocispec.MediaTypeImageManifest, digest.FromString("{}"), text))
}

// What refers to a manifest is upstream's list or, where the registry keeps none,
// the one under the tag; filtered by type here; kept while a tag's answer is good,
// and while upstream is silent; and what has none has an empty one.
func TestReferrers(t *testing.T) {
	img := upstreamtest.NewImage("layer")
	subject := img.Manifest.Digest
	sig, sbom := artifact("signature"), artifact("sbom")
	byList := func(m *mirror) {
		m.hub.Refer("library/app", subject, "application/sig", sig)
		m.hub.Refer("library/app", subject, "application/sbom", sbom)
	}
	byTag := func(m *mirror) {
		var a, b ocispec.Index
		_ = json.Unmarshal(upstreamtest.NewReferrerIndex("application/sig", sig).Body, &a)
		_ = json.Unmarshal(upstreamtest.NewReferrerIndex("application/sbom", sbom).Body, &b)
		a.Manifests = append(a.Manifests, b.Manifests...)
		body, err := json.Marshal(a)
		if err != nil {
			m.t.Fatal(err)
		}
		m.hub.PushManifest("library/app", oci.ReferrersTag(subject), upstreamtest.NewContent(ocispec.MediaTypeImageIndex, body))
	}
	for name, push := range map[string]func(*mirror){"upstream's list": byList, "the tag": byTag} {
		t.Run(name, func(t *testing.T) {
			m := newMirror(t, settings{ttl: time.Hour})
			m.hub.Push("library/app", "1", img)
			push(m)
			both := []string{sig.Digest.String(), sbom.Digest.String()}
			if got, _ := m.referrers(subject, ""); !slices.Equal(got, both) {
				t.Errorf("referrers are %q, want %q", got, both)
			}
			m.hub.Reset()
			got, a := m.referrers(subject, "?artifactType=application/sbom")
			if !slices.Equal(got, both[1:]) || a.header.Get("OCI-Filters-Applied") != "artifactType" {
				t.Errorf("of one type they are %q with %v, want %q", got, a.header, both[1:])
			}
			if got, _ := m.referrers(subject, "?artifactType=other"); len(got) != 0 {
				t.Errorf("of another type they are %q, want none", got)
			}
			if n := len(m.hub.Requests()); n != 0 {
				t.Errorf("upstream was asked %d times within the ttl, want never", n)
			}
		})
	}
	m := newMirror(t, settings{silence: 100 * time.Millisecond})
	m.hub.Push("library/app", "1", img)
	if got, _ := m.referrers(digest.FromString("none"), ""); len(got) != 0 {
		t.Errorf("referrers of what has none are %q", got)
	}
	for n, push := range []func(){func() { m.hub.Refer("library/app", subject, "application/sig", sig) }, func() { m.hub.Refer("library/app", subject, "application/sbom", sbom) }} {
		push()
		if got, _ := m.referrers(subject, ""); len(got) != n+1 {
			t.Errorf("with a ttl of nothing they are %q, want the new one, too", got)
		}
	}
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 503})
	got, a := m.referrers(subject, "")
	if len(got) != 2 || !strings.Contains(a.header.Get("Cache-Status"), "fwd=stale; fwd-status=503") {
		t.Errorf("while upstream is silent they are %q with %v, want those from before", got, a.header)
	}
	if a := m.get("/v2/library/app/referrers/" + digest.FromString("other").String()); a.status != 502 {
		t.Errorf("of what was never asked for it is %d, want upstream's trouble", a.status)
	}
}

// The catalog has the repositories that the ledger knows, under the names by which
// they can be pulled here, in pages.
func TestCatalog(t *testing.T) {
	m := newMirror(t, settings{})
	if a := m.get("/v2/_catalog"); a.status != 200 || string(a.body) != `{"repositories":[]}` {
		t.Errorf("at first it is %d %s, want none", a.status, a.body)
	}
	img := upstreamtest.NewImage("layer")
	for _, repo := range []string{"library/b", "library/a", "org/c"} {
		m.hub.Push(repo, "1", img)
		m.pull(repo, "1", img)
	}
	m.ghcr.Push("org/d", "1", img)
	m.pull("ghcr.io/org/d", "1", img)
	want := []string{"docker.io/library/a", "docker.io/library/b", "docker.io/org/c", "ghcr.io/org/d"}
	for n := 1; n < 6; n++ {
		var got []string
		for path := fmt.Sprintf("/v2/_catalog?n=%d", n); path != ""; {
			a := m.get(path)
			var list struct{ Repositories []string }
			if err := json.Unmarshal(a.body, &list); err != nil || len(list.Repositories) > n {
				t.Fatalf("GET %s = %d %s", path, a.status, a.body)
			}
			got = append(got, list.Repositories...)
			path, _, _ = strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), ">")
		}
		if !slices.Equal(got, want) {
			t.Errorf("in pages of %d it is %q, want %q", n, got, want)
		}
	}
	if a := m.get("/v2/_catalog?n=x"); a.status != 400 {
		t.Errorf("n=x is %d, want 400", a.status)
	}
	for _, repo := range want {
		if a := m.get("/v2/" + repo + "/manifests/1"); a.status != 200 {
			t.Errorf("%s from the catalog is %d", repo, a.status)
		}
	}
}

// A push goes through as it is, under upstream's own names, and what it makes of a
// tag is in the ledger with its origin when the client is told that it succeeded.
func TestPushIsPassedOnAndRecorded(t *testing.T) {
	real := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(real.Close)
	m := newMirror(t, settings{ttl: time.Hour, push: true, hubAt: real.URL})
	ref, err := name.ParseReference(strings.TrimPrefix(m.url, "http://")+"/library/app:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		img, err := random.Image(100_000, 2)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, img); err != nil {
			t.Fatalf("push %d: %v", i, err)
		}
		want, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		st, err := m.store.State(t.Context(), audit.Ref{Upstream: "docker.io", Repository: "library/app", Tag: "1"})
		if err != nil || st.Head.String() != want.String() {
			t.Errorf("after push %d the ledger knows %s, %v; want %s", i, st.Head, err, want)
		}
		if a := m.get("/v2/library/app/manifests/1"); a.header.Get("Docker-Content-Digest") != want.String() {
			t.Errorf("after push %d the tag is %s, want %s", i, a.header.Get("Docker-Content-Digest"), want)
		}
	}
	entries, err := m.store.Events(t.Context(), audit.EventQuery{})
	if err != nil || len(entries) != 3 {
		t.Fatalf("the ledger has %d events, %v; want one for each push", len(entries), err)
	}
	for _, e := range entries {
		if !bytes.Contains(e.Leaf, []byte(`"trigger":"push"`)) {
			t.Errorf("an event is %s, want its origin", e.Leaf)
		}
	}
}

// Without push: pass, whatever changes a repository is refused, and nobody is
// asked.
func TestPushIsRefused(t *testing.T) {
	m := newMirror(t, settings{})
	for _, q := range []struct{ method, path string }{
		{"POST", "/v2/library/app/blobs/uploads/"}, {"PATCH", "/v2/library/app/blobs/uploads/x"}, {"PUT", "/v2/library/app/manifests/1"},
		{"DELETE", "/v2/library/app/manifests/1"}, {"DELETE", "/v2/library/app/blobs/" + digest.FromString("x").String()},
	} {
		if a := m.do(q.method, q.path); a.status != 405 || !strings.Contains(string(a.body), "UNSUPPORTED") {
			t.Errorf("%s %s = %d %s, want 405", q.method, q.path, a.status, a.body)
		}
	}
	if n := len(m.hub.Requests()); n != 0 {
		t.Errorf("upstream was asked %d times", n)
	}
}

// A client is answered or refused before it gives up, however upstream dawdles:
// what is known is served, what is not is told as not to be had in time, and what
// was begun for it is there for the next.
func TestClientsAreAnsweredInTime(t *testing.T) {
	const within = 400 * time.Millisecond
	m := newMirror(t, settings{patience: within, silence: 10 * time.Second})
	img := upstreamtest.NewImage("layer")
	m.hub.Push("library/app", "1", img)
	m.pull("library/app", "1", img)
	m.settled()
	for _, tt := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/v2/library/app/manifests/1", 200},
		{"HEAD", "/v2/library/app/manifests/1", 200},
		{"GET", "/v2/library/app/manifests/" + img.Manifest.Digest.String(), 200},
		{"GET", "/v2/library/app/blobs/" + img.Layers[0].Digest.String(), 200},
		{"GET", "/v2/library/app/manifests/2", 504},
		{"GET", "/v2/library/app/manifests/" + digest.FromString("x").String(), 504},
		{"HEAD", "/v2/library/app/manifests/" + digest.FromString("x").String(), 504},
		{"GET", "/v2/library/app/blobs/" + digest.FromString("x").String(), 504},
		{"HEAD", "/v2/library/app/blobs/" + digest.FromString("x").String(), 504},
		{"GET", "/v2/library/app/referrers/" + digest.FromString("x").String(), 504},
		{"GET", "/v2/library/other/tags/list", 504},
		{"GET", "/v2/library/app/tags/list", 200},
	} {
		m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Hang})
		m.up.ForgetMissing("library/app")
		began := time.Now()
		a := m.do(tt.method, tt.path)
		if took := time.Since(began); a.status != tt.status || took > within+2*time.Second {
			t.Errorf("%s %s = %d %s after %v, want %d within %v", tt.method, tt.path, a.status, a.body, took, tt.status, within)
		}
		m.hub.Mend()
		m.hub.Release()
	}
}

// An uploading is a registry that takes what is pushed, and goes on with uploads at a
// path of its own, as Google's do. It lets nobody read but who sends reader.
func uploading(t *testing.T, reader string) (url string, asked func() []string) {
	var mu sync.Mutex
	var got []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		got = append(got, r.Method+" "+r.RequestURI)
		mu.Unlock()
		switch {
		case r.Method == http.MethodGet || r.Method == http.MethodHead:
			if r.Header.Get("Authorization") != reader {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			m := upstreamtest.NewImage("pushed").Manifest
			w.Header().Set("Content-Type", m.MediaType)
			w.Header().Set("Docker-Content-Digest", m.Digest.String())
			_, _ = w.Write(m.Body) // a HEAD has none
		case r.Method == http.MethodPost:
			w.Header().Set("Location", "/artifacts-uploads/x?state=y")
			w.WriteHeader(http.StatusAccepted)
		default:
			w.Header().Set("Docker-Content-Digest", upstreamtest.NewImage("pushed").Manifest.Digest.String())
			w.WriteHeader(http.StatusCreated)
		}
	}))
	t.Cleanup(srv.Close)
	return srv.URL, func() []string { mu.Lock(); defer mu.Unlock(); return slices.Clone(got) }
}

// An upload that upstream goes on with elsewhere goes on there, for the repository
// that it was begun in, and the path cannot be chosen.
func TestUploadGoesOnElsewhere(t *testing.T) {
	at, asked := uploading(t, "")
	m := newMirror(t, settings{push: true, hubAt: at})
	begun := m.do("POST", "/v2/evil/own/blobs/uploads/")
	path, query, _ := strings.Cut(begun.header.Get("Location"), "?")
	if begun.status != 202 || !strings.HasPrefix(path, "/v2/evil/own/blobs/uploads/") || query != "state=y" {
		t.Fatalf("POST = %d %v, want a Location through here", begun.status, begun.header)
	}
	if a := m.do("PUT", path+"?"+query+"&digest=z"); a.status != 201 {
		t.Errorf("PUT = %d %s", a.status, a.body)
	}
	if got := asked(); got[len(got)-1] != "PUT /artifacts-uploads/x?digest=z&state=y" {
		t.Errorf("upstream was asked %q, want the upload to go on there", got)
	}
	before := len(asked())
	name := strings.TrimPrefix(path, "/v2/evil/own/blobs/uploads/")
	for _, p := range []string{
		"/v2/acme/private/blobs/uploads/" + name, "/v2/evil/own/blobs/uploads/~x.L2FwaQ", "/v2/evil/own/blobs/uploads/~", "/v2/evil/own/blobs/uploads/" + name[:len(name)-2],
		"/v2/evil/own/blobs/uploads/../../../api", "/v2/evil/own/blobs/uploads/%2e%2e/x", "/v2/evil/own/blobs/uploads/..;/x", "/v2/evil/own/blobs/uploads/%252e%252e/x", "/v2/evil/own/blobs/uploads/..%3bx/x",
	} {
		if a := m.do("PUT", p); a.status != 404 {
			t.Errorf("PUT %s = %d %s, want 404", p, a.status, a.body)
		}
	}
	if n := len(asked()); n != before {
		t.Errorf("upstream was asked %q for what leads away", asked()[before:])
	}
}

// What somebody pushes with credentials of his own is not known to those who may not
// read it.
func TestPushTellsNobodyWhatHeMayNotRead(t *testing.T) {
	const owner = "Bearer owner"
	at, _ := uploading(t, owner)
	for _, passthrough := range []bool{false, true} {
		m := newMirror(t, settings{push: true, passthrough: passthrough, hubAt: at})
		if a := m.do("PUT", "/v2/acme/private/manifests/1", "Authorization: "+owner); a.status != 201 {
			t.Fatalf("PUT = %d %s", a.status, a.body)
		}
		m.do("PUT", "/v2/acme/private/manifests/1", "Authorization: Bearer robot") // may push, and not read
		for _, who := range []string{"", "Bearer robot"} {
			for _, p := range []string{"manifests/1", "manifests/" + upstreamtest.NewImage("pushed").Manifest.Digest.String()} {
				if a := m.get("/v2/acme/private/"+p, "Authorization: "+who); a.status != 403 {
					t.Errorf("passthrough %t: %s as %q = %d, want upstream's 403", passthrough, p, who, a.status)
				}
			}
		}
	}
}
