package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/proxy/oci"
	"tidemark/proxy/upstream"
	"tidemark/proxy/upstream/upstreamtest"
)

// newRegistry starts a fake upstream that lives as long as its test.
func newRegistry(t *testing.T) *upstreamtest.Registry {
	t.Helper()
	reg := upstreamtest.New()
	t.Cleanup(reg.Close)
	return reg
}

// newServer starts an upstream that the fake one cannot play.
func newServer(t *testing.T, h http.HandlerFunc) *url.URL {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return parse(t, srv.URL)
}

func parse(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// open is the upstream under test, called hub, at one or more endpoints.
func open(o upstream.Options, endpoints ...*url.URL) *upstream.Upstream {
	o.Name, o.Endpoints, o.UserAgent = "hub", endpoints, "tidemark/test"
	return upstream.New(o)
}

// refusal takes the *upstream.Error out of err.
func refusal(t *testing.T, err error) *upstream.Error {
	t.Helper()
	var ue *upstream.Error
	if !errors.As(err, &ue) {
		t.Fatalf("error = %v (%T), want an *upstream.Error", err, err)
	}
	if ue.Upstream != "hub" || !strings.HasPrefix(ue.Error(), "hub: "+ue.Op+": ") {
		t.Errorf("error = %q, does not begin with the upstream and what it was asked", ue)
	}
	return ue
}

// A manifest, a blob and the size of each arrive as upstream sent them, asked
// for under one name and in one fixed Accept, with nothing that would let
// another kind of manifest in.
func TestContentArrivesAsUpstreamSentIt(t *testing.T) {
	reg := newRegistry(t)
	img := upstreamtest.NewImage("a layer of some length")
	reg.Push("library/app", "1", img)
	hub := open(upstream.Options{}, reg.URL())

	head, err := hub.HeadManifest(t.Context(), "library/app", "1")
	if err != nil || head.Digest != img.Manifest.Digest || head.Size != int64(len(img.Manifest.Body)) || head.Body != nil {
		t.Errorf("HeadManifest = %+v, %v; want digest and size of the manifest, no body", head, err)
	}
	for _, reference := range []string{"1", img.Manifest.Digest.String()} {
		m, err := hub.GetManifest(t.Context(), "library/app", reference)
		if err != nil || m.Digest != img.Manifest.Digest || m.MediaType != img.Manifest.MediaType || !bytes.Equal(m.Body, img.Manifest.Body) {
			t.Errorf("GetManifest(%s) = %+v, %v; want the manifest", reference, m, err)
		}
	}
	layer := img.Layers[0]
	if size, err := hub.HeadBlob(t.Context(), "library/app", layer.Digest); err != nil || size != int64(len(layer.Body)) {
		t.Errorf("HeadBlob = %d, %v; want %d", size, err, len(layer.Body))
	}
	blob, err := hub.GetBlob(t.Context(), "library/app", layer.Digest, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Body.Close()
	if got, err := io.ReadAll(blob.Body); err != nil || !bytes.Equal(got, layer.Body) || blob.Size != int64(len(layer.Body)) {
		t.Errorf("blob = %q of %d, %v; want %q", got, blob.Size, err, layer.Body)
	}

	const accept = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, " +
		"application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
	asked := reg.Requests()
	if len(asked) != 5 {
		t.Errorf("upstream was asked %d times, want 5", len(asked))
	}
	for _, q := range asked {
		if strings.Contains(q.Path, "/manifests/") && q.Accept != accept {
			t.Errorf("%s %s was asked with Accept %q, want %q", q.Method, q.Path, q.Accept, accept)
		}
		if q.Authorization != "" {
			t.Errorf("%s %s was asked with credentials, want none", q.Method, q.Path)
		}
	}
}

// What upstream does not tell is told as unknown: a missing digest is "", a
// missing length is -1.
func TestWhatUpstreamDoesNotTellIsUnknown(t *testing.T) {
	reg := newRegistry(t)
	img := upstreamtest.NewImage("layer")
	reg.Push("app", "1", img)
	reg.Break(upstreamtest.Fault{Name: upstreamtest.NoDigest, Path: "/manifests/"})
	reg.Break(upstreamtest.Fault{Name: upstreamtest.NoLength, Path: "/blobs/"})
	hub := open(upstream.Options{}, reg.URL())

	if m, err := hub.GetManifest(t.Context(), "app", "1"); err != nil || m.Digest != "" || !bytes.Equal(m.Body, img.Manifest.Body) {
		t.Errorf("manifest without a claim = %+v, %v; want its body and no digest", m, err)
	}
	blob, err := hub.GetBlob(t.Context(), "app", img.Layers[0].Digest, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Body.Close()
	if blob.Size != -1 {
		t.Errorf("size of a blob without a length = %d, want -1", blob.Size)
	}
}

// A download goes on from where it ended, and an upstream that ignores ranges
// is noticed rather than believed.
func TestRangesSayWhereTheyBegin(t *testing.T) {
	reg := newRegistry(t)
	img := upstreamtest.NewImage("0123456789")
	reg.Push("app", "1", img)
	dgst := img.Layers[0].Digest
	hub := open(upstream.Options{}, reg.URL())

	for _, c := range []struct {
		name       string
		off, n     int64
		deaf       bool
		sent, body string
		offset     int64
	}{
		{name: "whole", off: 0, n: -1, sent: "", body: "0123456789"},
		{name: "to the end", off: 4, n: -1, sent: "bytes=4-", body: "456789", offset: 4},
		{name: "the middle", off: 4, n: 3, sent: "bytes=4-6", body: "456", offset: 4},
		{name: "the beginning", off: 0, n: 2, sent: "bytes=0-1", body: "01"},
		{name: "ignored", off: 4, n: -1, deaf: true, sent: "bytes=4-", body: "0123456789"},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg.Reset()
			if c.deaf {
				reg.Break(upstreamtest.Fault{Name: upstreamtest.NoRange})
			}
			blob, err := hub.GetBlob(t.Context(), "app", dgst, c.off, c.n)
			if err != nil {
				t.Fatal(err)
			}
			defer blob.Body.Close()
			got, err := io.ReadAll(blob.Body)
			if err != nil || string(got) != c.body || blob.Offset != c.offset || blob.Size != 10 {
				t.Errorf("got %q from %d of %d, %v; want %q from %d of 10", got, blob.Offset, blob.Size, err, c.body, c.offset)
			}
			if asked := reg.Requests(); len(asked) != 1 || asked[0].Range != c.sent {
				t.Errorf("upstream was asked %+v, want one request with Range %q", asked, c.sent)
			}
		})
	}

	reg.Reset()
	_, err := hub.GetBlob(t.Context(), "app", dgst, 10, -1)
	if got := refusal(t, err).Status; got != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("a range behind the end: status %d, want 416", got)
	}
}

// A 206 that does not say it begins where it was asked to begin is nonsense:
// its bytes would end up in the wrong place.
func TestLyingContentRangeIsNonsense(t *testing.T) {
	for _, c := range []struct {
		contentRange string
		size         int64 // 0 when it is a lie
	}{
		{"bytes 4-9/10", 10},
		{"bytes 4-9/*", -1},
		{"bytes 0-9/10", 0},
		{"bytes 5-9/10", 0},
		{"bytes 4-9/4", 0},
		{"bytes 4-9/-1", 0},
		{"bytes -4-9/10", 0},
		{"bytes 4-9", 0},
		{"bytes */10", 0},
		{"pages 4-9/10", 0},
		{"", 0},
	} {
		t.Run(c.contentRange, func(t *testing.T) {
			addr := newServer(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Range", c.contentRange)
				w.WriteHeader(http.StatusPartialContent)
				_, _ = io.WriteString(w, "456789")
			})
			blob, err := open(upstream.Options{}, addr).GetBlob(t.Context(), "app", upstreamtest.NewContent("", nil).Digest, 4, -1)
			if c.size != 0 {
				if err != nil || blob.Offset != 4 || blob.Size != c.size {
					t.Fatalf("got %+v, %v; want byte 4 of %d", blob, err, c.size)
				}
				blob.Body.Close()
				return
			}
			if ue := refusal(t, err); !ue.Nonsense || ue.Status != 0 || !strings.Contains(ue.Error(), "asked for bytes from 4") {
				t.Errorf("error = %v, want nonsense about the range that was asked for", ue)
			}
		})
	}
}

// Answers that no registry should send are told as nonsense, never as a status
// that upstream could mean.
func TestNonsenseIsNotAnAnswer(t *testing.T) {
	for _, c := range []struct {
		name, says string
		answer     http.HandlerFunc
	}{
		{"digest that is none", "is not a digest", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Docker-Content-Digest", "sha256:../../etc/passwd")
		}},
		{"no content", "unexpected status 204", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }},
		{"redirect to nowhere", "unexpected status 304", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotModified) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			hub := open(upstream.Options{}, newServer(t, c.answer))
			_, err := hub.GetManifest(t.Context(), "app", "1")
			if ue := refusal(t, err); !ue.Nonsense || ue.Status != 0 || !strings.Contains(ue.Error(), c.says) {
				t.Errorf("error = %v, want nonsense that says %q", ue, c.says)
			}
		})
	}
}

// A manifest that does not end is cut off at 4 MiB, so that no upstream can
// fill our memory.
func TestEndlessManifestIsCutOff(t *testing.T) {
	reg := newRegistry(t)
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Endless})
	hub := open(upstream.Options{}, reg.URL())

	_, err := hub.GetManifest(t.Context(), "app", "1")
	if ue := refusal(t, err); !ue.Nonsense || !strings.Contains(ue.Error(), "larger than 4194304 bytes") {
		t.Errorf("error = %v, want nonsense that names the limit of 4194304 bytes", ue)
	}
}

// A manifest of exactly 4 MiB is the largest there may be, and is served.
func TestLargestManifestIsServed(t *testing.T) {
	reg := newRegistry(t)
	largest := upstreamtest.NewContent("application/vnd.oci.image.manifest.v1+json", bytes.Repeat([]byte{' '}, oci.MaxManifest))
	reg.PushManifest("app", "1", largest)
	m, err := open(upstream.Options{}, reg.URL()).GetManifest(t.Context(), "app", "1")
	if err != nil || m.Size != 4<<20 {
		t.Errorf("manifest of 4 MiB: %d bytes, %v; want 4194304", m.Size, err)
	}
}

// Statuses are kept apart, each with upstream's own words, because clients do
// different things about them; only 404 means that something does not exist.
func TestStatusesAreKeptApart(t *testing.T) {
	for _, status := range []int{401, 403, 404, 429, 500, 503} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			reg := newRegistry(t)
			reg.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: int64(status)})
			hub := open(upstream.Options{}, reg.URL())

			_, err := hub.GetManifest(t.Context(), "app", "1")
			ue := refusal(t, err)
			if ue.Status != status || ue.Nonsense || ue.Message != "FAULT said upstreamtest" || ue.Op != "GET /v2/app/manifests/1" {
				t.Errorf("got %+v, want status %d in upstream's words", ue, status)
			}
			if got, want := errors.Is(err, fs.ErrNotExist), status == 404; got != want {
				t.Errorf("does not exist = %v, want %v", got, want)
			}
			if got := reg.Count("", ""); got != 1 {
				t.Errorf("upstream was asked %d times, want 1", got)
			}
		})
	}
}

// The time for which upstream asks not to be asked is told, in seconds or until
// a date, and is never longer than an hour.
func TestRetryAfterIsTold(t *testing.T) {
	for _, c := range []struct {
		header          string
		atLeast, atMost time.Duration
	}{
		{"", 0, 0},
		{"7", 7 * time.Second, 7 * time.Second},
		{"86400", time.Hour, time.Hour},
		{time.Now().Add(5 * time.Minute).UTC().Format(http.TimeFormat), 4 * time.Minute, 5 * time.Minute},
		{time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat), 0, 0},
		{"-5", 0, 0},
		{"soon", 0, 0},
	} {
		t.Run(c.header, func(t *testing.T) {
			reg := newRegistry(t)
			reg.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 429, Header: http.Header{"Retry-After": {c.header}}})
			_, err := open(upstream.Options{}, reg.URL()).HeadManifest(t.Context(), "app", "1")
			if got := refusal(t, err).RetryAfter; got < c.atLeast || got > c.atMost {
				t.Errorf("Retry-After %q is told as %v, want %v to %v", c.header, got, c.atLeast, c.atMost)
			}
		})
	}
}

// What upstream does not have is not asked for again for a few seconds,
// whichever way it is asked for; other paths are.
func TestMissingIsRemembered(t *testing.T) {
	reg := newRegistry(t)
	hub := open(upstream.Options{}, reg.URL())
	ask := func(ctx context.Context, tag string) error {
		_, err := hub.HeadManifest(ctx, "app", tag)
		return err
	}
	for range 5 {
		if err := ask(t.Context(), "gone"); !errors.Is(err, fs.ErrNotExist) || refusal(t, err).Status != 404 {
			t.Errorf("error = %v, want 404", err)
		}
	}
	if _, err := hub.GetManifest(t.Context(), "app", "gone"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error of a GET = %v, want 404", err)
	}
	if got := reg.Count("", "/gone"); got != 1 {
		t.Errorf("upstream was asked %d times for what it does not have, want 1", got)
	}
	if err := ask(t.Context(), "other"); !errors.Is(err, fs.ErrNotExist) || reg.Count("", "/other") != 1 {
		t.Errorf("another tag: %v after %d requests, want 404 after 1", err, reg.Count("", "/other"))
	}
	if h := hub.Health(); !h.Healthy {
		t.Errorf("an upstream without something is unhealthy: %s", h.LastError)
	}
}

// Tags come in upstream's own pages, each with the query of the next one.
func TestTagsArePagedAsUpstreamPagesThem(t *testing.T) {
	reg := newRegistry(t)
	for _, tag := range []string{"1", "2", "3", "4", "5"} {
		reg.Push("library/app", tag, upstreamtest.NewImage(tag))
	}
	hub := open(upstream.Options{}, reg.URL())

	var pages [][]string
	for query := (url.Values{"n": {"2"}}); query != nil; {
		tags, next, err := hub.Tags(t.Context(), "library/app", query)
		if err != nil {
			t.Fatal(err)
		}
		pages, query = append(pages, tags), next
	}
	want := [][]string{{"1", "2"}, {"3", "4"}, {"5"}}
	if !slices.EqualFunc(pages, want, slices.Equal[[]string]) {
		t.Errorf("pages = %v, want %v", pages, want)
	}
	if got := reg.Count("GET", "/v2/library/app/tags/list"); got != 3 {
		t.Errorf("upstream was asked %d times, want 3", got)
	}
}

// The next page is found in every form of Link that registries send.
func TestLinkForms(t *testing.T) {
	for _, c := range []struct{ link, last string }{
		{`</v2/app/tags/list?last=b&n=2>; rel="next"`, "b"},
		{`</v2/app/tags/list?last=b&n=2>; rel=next`, "b"},
		{`<https://elsewhere.example/v2/app/tags/list?last=b>;rel="next"`, "b"},
		{`</first>; rel="first", </v2/app/tags/list?last=b>; rel="next"`, "b"},
		{`</v2/app/tags/list?last=b>; rel="prev"`, ""},
		{`rel="next"`, ""},
		{``, ""},
	} {
		t.Run(c.link, func(t *testing.T) {
			hub := open(upstream.Options{}, newServer(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Link", c.link)
				_, _ = io.WriteString(w, `{"name":"app","tags":["a","b"]}`)
			}))
			tags, next, err := hub.Tags(t.Context(), "app", nil)
			if err != nil || !slices.Equal(tags, []string{"a", "b"}) || next.Get("last") != c.last {
				t.Errorf("got %v, next %v, %v; want [a b], next after %q", tags, next, err, c.last)
			}
		})
	}
}

// A list of tags that is a page of HTML is nonsense, not an empty list.
func TestGarbageIsNotATagList(t *testing.T) {
	reg := newRegistry(t)
	reg.Break(upstreamtest.Fault{Name: upstreamtest.Garbage})
	tags, _, err := open(upstream.Options{}, reg.URL()).Tags(t.Context(), "app", nil)
	if ue := refusal(t, err); !ue.Nonsense || tags != nil {
		t.Errorf("got %v, %v; want nonsense", tags, err)
	}
}
