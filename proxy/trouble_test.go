package proxy_test

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/proxy/upstream/upstreamtest"
)

// Upstream's troubles are told apart and told truthfully, and a tag that is
// known is served through all of them.
func TestUpstreamsTroublesStayUpstream(t *testing.T) {
	html := upstreamtest.Fault{Name: upstreamtest.Garbage}
	for _, tt := range []struct {
		name   string
		fault  upstreamtest.Fault
		status int
		code   string
		detail string // of the error
		cache  string // Cache-Status of a tag that is known
	}{
		{"401", upstreamtest.Fault{Name: upstreamtest.Status, At: 401}, 401, "UNAUTHORIZED", `"status":401`, "fwd-status=401"},
		{"403", upstreamtest.Fault{Name: upstreamtest.Status, At: 403}, 403, "DENIED", `"status":403`, "fwd-status=403"},
		{"404", upstreamtest.Fault{Name: upstreamtest.Status, At: 404}, 404, "MANIFEST_UNKNOWN", `"status":404`, "fwd-status=404"},
		{"429", upstreamtest.Fault{Name: upstreamtest.Status, At: 429, Header: http.Header{"Retry-After": {"7"}}}, 429, "TOOMANYREQUESTS", `"status":429`, "fwd-status=429"},
		{"500", upstreamtest.Fault{Name: upstreamtest.Status, At: 500}, 502, "UNKNOWN", `"status":500`, "fwd-status=500"},
		{"503", upstreamtest.Fault{Name: upstreamtest.Status, At: 503}, 502, "UNKNOWN", `"status":503`, "fwd-status=503"},
		{"no answer", upstreamtest.Fault{Name: upstreamtest.Hang}, 504, "UNAVAILABLE", `"upstream":"docker.io"`, "detail=no-answer"},
		{"a captive portal", html, 502, "UNKNOWN", `"upstream":"docker.io"`, ""},
		{"an endless manifest", upstreamtest.Fault{Name: upstreamtest.Endless, Method: "GET"}, 502, "UNKNOWN", `"upstream":"docker.io"`, ""},
		{"a lying digest", upstreamtest.Fault{Name: upstreamtest.Lie}, 502, "UNKNOWN", `"upstream":"docker.io"`, "fwd=stale"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMirror(t, settings{})
			img := upstreamtest.NewImage("layer")
			m.hub.Push("library/known", "1", img)
			m.hub.Push("library/new", "1", upstreamtest.NewImage("other"))
			m.pull("known", "1", img)
			m.settled()
			m.hub.Break(tt.fault)
			a := m.get("/v2/new/manifests/1")
			if a.status != tt.status || a.code(t) != tt.code || !strings.Contains(string(a.body), tt.detail) {
				t.Errorf("a new tag: %d %s, want %d %s %s", a.status, a.body, tt.status, tt.code, tt.detail)
			}
			if tt.name == "429" && a.header.Get("Retry-After") != "7" {
				t.Errorf("Retry-After is %q, want upstream's 7", a.header.Get("Retry-After"))
			}
			if a.header.Get("Docker-Content-Digest") != "" || a.header.Get("Cache-Control") != "" {
				t.Errorf("an error has the headers of content: %v", a.header)
			}
			m.pull("known", "1", img)
			a = m.get("/v2/known/manifests/1")
			if cs := a.header.Get("Cache-Status"); a.status != 200 || !strings.Contains(cs, tt.cache) {
				t.Errorf("the known tag: %d %q, want 200 and %q", a.status, cs, tt.cache)
			}
			want := "[tag.first_seen]"
			if tt.name == "a lying digest" {
				want = "[tag.first_seen upstream.inconsistent]"
			}
			if got := types(audittest.Check(t, m.store)); got != want {
				t.Errorf("events are %s, want %s", got, want)
			}
		})
	}
}

// A digest that is missing, or that GET by digest does not have, does not move
// a tag; an old registry without the header is asked for the bytes.
func TestOnlyVerifiedDigestsMoveATag(t *testing.T) {
	m := newMirror(t, settings{})
	old, next := upstreamtest.NewImage("old"), upstreamtest.NewImage("new")
	m.hub.Push("library/app", "1", old)
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.NoDigest})
	m.pull("app", "1", old)
	m.hub.Push("library/app", "1", next)
	m.pull("app", "1", next)
	m.hub.Mend()

	gone := upstreamtest.NewImage("gone")
	m.hub.Push("library/app", "1", gone)
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 404, Method: "GET", Path: gone.Manifest.Digest.String()})
	m.pull("app", "1", next) // HEAD says gone, but nobody can have it
	m.pull("app", "1", next)
	if got := types(audittest.Check(t, m.store)); got != "[tag.first_seen tag.moved upstream.inconsistent]" {
		t.Errorf("events are %s; want the contradiction told once", got)
	}
}

// types are those of events, in order.
func types(events []audit.Event) string {
	out := []audit.Type{}
	for _, e := range events {
		out = append(out, e.Type)
	}
	return fmt.Sprint(out)
}

// However a blob goes wrong on its way, no client completes a wrong copy, no
// wrong byte is kept, and cuts are mended without the client noticing.
func TestBlobsThroughFaults(t *testing.T) {
	layer := strings.Repeat("0123456789abcdef", 200_000)
	img := upstreamtest.NewImage(layer)
	size, mid := int64(len(layer)), int64(len(layer)/2)
	path := img.Layers[0].Digest.String()
	for _, tt := range []struct {
		name  string
		fault upstreamtest.Fault
		ok    bool  // the client gets all of it at once
		sent  int64 // bytes upstream sent until then, 0 for any
	}{
		{"cut half-way", upstreamtest.Fault{Name: upstreamtest.Cut, At: mid, Times: 1}, true, size},
		{"stalled half-way", upstreamtest.Fault{Name: upstreamtest.Stall, At: mid, Times: 1}, true, 0},
		{"one wrong byte", upstreamtest.Fault{Name: upstreamtest.Wrong, At: mid, Times: 1}, false, size},
		{"the last byte is wrong", upstreamtest.Fault{Name: upstreamtest.Wrong, At: size - 1, Times: 1}, false, size},
		{"no ranges, cut", upstreamtest.Fault{Name: upstreamtest.NoRange, Times: 2}, true, 0},
		{"no length", upstreamtest.Fault{Name: upstreamtest.NoLength, Times: 1}, true, size},
		{"at another host", upstreamtest.Fault{Name: upstreamtest.Redirect, Times: 1}, true, 0},
		{"a page of HTML", upstreamtest.Fault{Name: upstreamtest.Garbage, Times: 1}, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMirror(t, settings{})
			m.hub.Push("library/app", "1", img)
			tt.fault.Path = path
			m.hub.Break(tt.fault)
			a := m.get("/v2/library/app/blobs/" + path)
			complete := a.err == nil && a.status == 200 && len(a.body) == len(layer)
			if complete != tt.ok || complete && string(a.body) != layer {
				t.Errorf("client got %d with %d of %d bytes, %v; want success %t", a.status, len(a.body), size, a.err, tt.ok)
			}
			if !tt.ok && int64(len(a.body)) >= size {
				t.Error("a wrong copy was complete")
			}
			if sent := m.hub.Sent(path); tt.sent > 0 && sent != tt.sent {
				t.Errorf("upstream sent %d bytes, want %d", sent, tt.sent)
			}
			m.settled()
			if a := m.get("/v2/library/app/blobs/" + path); string(a.body) != layer {
				t.Errorf("afterwards: %d with %d bytes, %v", a.status, len(a.body), a.err)
			}
		})
	}
}

// 64 clients on one cold blob are one download upstream; one that leaves at a
// tenth changes nothing for the others.
func TestHerdIsOneDownload(t *testing.T) {
	m := newMirror(t, settings{silence: time.Minute})
	layer := strings.Repeat("0123456789abcdef", 400_000)
	img := upstreamtest.NewImage(layer)
	path := img.Layers[0].Digest.String()
	m.hub.Push("library/app", "1", img)
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Stall, Path: path, At: int64(len(layer) / 5), Times: 1})
	var wg sync.WaitGroup
	leavers := make(chan struct{}, 8)
	for i := range 64 {
		wg.Go(func() {
			resp, err := http.Get(m.url + "/v2/library/app/blobs/" + path)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if i < 8 {
				b := make([]byte, len(layer)/10)
				if n, err := readFull(resp, b); err != nil {
					t.Errorf("leaver got %d bytes, %v", n, err)
				}
				leavers <- struct{}{}
				return
			}
			var b bytes.Buffer
			if _, err := b.ReadFrom(resp.Body); err != nil || b.String() != layer {
				t.Errorf("client %d got %d bytes, %v", i, b.Len(), err)
			}
		})
	}
	for range 8 {
		<-leavers
	}
	m.hub.Release()
	wg.Wait()
	if n, sent := m.hub.Count("GET", path), m.hub.Sent(path); n != 1 || sent != int64(len(layer)) {
		t.Errorf("upstream was asked %d times and sent %d bytes, want once and %d", n, sent, len(layer))
	}
}

func readFull(resp *http.Response, b []byte) (int, error) {
	n := 0
	for n < len(b) {
		m, err := resp.Body.Read(b[n:])
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// HEAD of a cold blob asks upstream with HEAD and downloads nothing; of a warm
// one it asks nobody.
func TestColdHeadDownloadsNothing(t *testing.T) {
	m := newMirror(t, settings{})
	img := upstreamtest.NewImage("a layer")
	m.hub.Push("library/app", "1", img)
	for _, path := range []string{"/v2/app/blobs/" + img.Layers[0].Digest.String(), "/v2/app/manifests/" + img.Manifest.Digest.String()} {
		a := m.do("HEAD", path)
		if a.status != 200 || a.header.Get("Content-Length") == "0" || a.header.Get("Content-Length") == "" {
			t.Errorf("HEAD %s = %d %v", path, a.status, a.header)
		}
	}
	if n := m.hub.Count("GET", ""); n != 0 {
		t.Errorf("%d downloads for HEADs, want none", n)
	}
	if a := m.do("HEAD", "/v2/app/blobs/sha256:"+strings.Repeat("0", 64)); a.status != 404 {
		t.Errorf("HEAD of a blob that is not there = %d", a.status)
	}
	m.pull("app", "1", img)
	m.settled()
	m.hub.Reset()
	m.do("HEAD", "/v2/app/blobs/"+img.Layers[0].Digest.String())
	m.do("HEAD", "/v2/app/manifests/"+img.Manifest.Digest.String())
	if n := len(m.hub.Requests()); n != 0 {
		t.Errorf("warm HEADs asked upstream %d times", n)
	}
}

// Single ranges are right on cold and on cached blobs alike.
func TestRangesColdAndWarm(t *testing.T) {
	layer := strings.Repeat("0123456789", 100_000)
	img := upstreamtest.NewImage(layer)
	path := "/v2/library/app/blobs/" + img.Layers[0].Digest.String()
	for _, tt := range []struct {
		header string
		status int
		want   string
		cr     string
	}{
		{"bytes=0-9", 206, layer[:10], "bytes 0-9/1000000"},
		{"bytes=500000-500009", 206, layer[500000:500010], "bytes 500000-500009/1000000"},
		{"bytes=999990-", 206, layer[999990:], "bytes 999990-999999/1000000"},
		{"bytes=-5", 206, layer[999995:], "bytes 999995-999999/1000000"},
		{"bytes=999999-2000000", 206, layer[999999:], "bytes 999999-999999/1000000"},
		{"bytes=1000000-", 416, "", "bytes */1000000"},
		{"bytes=0-1,5-6", 200, layer, ""},
		{"chunks=1-2", 200, layer, ""},
	} {
		for _, state := range []string{"cold", "warm"} {
			t.Run(fmt.Sprintf("%s %s", tt.header, state), func(t *testing.T) {
				m := newMirror(t, settings{})
				m.hub.Push("library/app", "1", img)
				if state == "warm" {
					m.get(path)
					m.settled()
					m.hub.Reset()
				}
				a := m.get(path, "Range: "+tt.header)
				if a.status != tt.status || a.header.Get("Content-Range") != tt.cr || a.err != nil || tt.status < 400 && string(a.body) != tt.want {
					t.Errorf("%d %q with %d bytes, %v; want %d %q with %d", a.status, a.header.Get("Content-Range"), len(a.body), a.err, tt.status, tt.cr, len(tt.want))
				}
				if state == "warm" && len(m.hub.Requests()) != 0 {
					t.Error("upstream was asked for what is here")
				}
			})
		}
	}
}

// Tags are listed as upstream pages them, under the name the client uses; when
// upstream does not answer, those that are known are.
func TestTagsAreListed(t *testing.T) {
	m := newMirror(t, settings{})
	img := upstreamtest.NewImage("x")
	for _, tag := range []string{"1", "2", "3"} {
		m.ghcr.Push("org/app", tag, img)
	}
	a := m.get("/v2/ghcr.io/org/app/tags/list?n=2")
	if string(a.body) != `{"name":"ghcr.io/org/app","tags":["1","2"]}` || a.header.Get("Link") != `</v2/ghcr.io/org/app/tags/list?last=2&n=2>; rel="next"` {
		t.Errorf("first page is %s %v", a.body, a.header)
	}
	a = m.get("/v2/org/app/tags/list?last=2&n=2&ns=ghcr.io")
	if string(a.body) != `{"name":"org/app","tags":["3"]}` || a.header.Get("Link") != "" {
		t.Errorf("second page is %s %v", a.body, a.header)
	}
	m.pull("ghcr.io/org/app", "3", img)
	m.pull("ghcr.io/org/app", "1", img)
	m.ghcr.Close()
	a = m.get("/v2/ghcr.io/org/app/tags/list?n=1")
	if string(a.body) != `{"name":"ghcr.io/org/app","tags":["1"]}` || !strings.Contains(a.header.Get("Cache-Status"), "stale") || !strings.Contains(a.header.Get("Link"), "last=1") {
		t.Errorf("without upstream: %s %v", a.body, a.header)
	}
	if a := m.get("/v2/ghcr.io/org/unknown/tags/list"); a.status != 504 {
		t.Errorf("of a repository not known, without upstream: %d %s", a.status, a.body)
	}
}

// A client that asks again while upstream is dead is answered at once: one
// question is enough to know.
func TestDeadUpstreamCostsLittle(t *testing.T) {
	m := newMirror(t, settings{})
	img := upstreamtest.NewImage("x")
	m.hub.Push("library/app", "1", img)
	m.pull("app", "1", img)
	m.settled()
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Hang})
	m.hub.Reset()
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Hang})
	began := time.Now()
	for range 20 {
		if a := m.get("/v2/app/manifests/1"); a.status != 200 {
			t.Fatalf("%d %s", a.status, a.body)
		}
	}
	if n, took := len(m.hub.Requests()), time.Since(began); n > 2 || took > 2*time.Second {
		t.Errorf("20 pulls asked the dead upstream %d times and took %v", n, took)
	}
}

// A layer is no manifest, whether it is here or not: 404, not an error of ours.
func TestLayerIsNoManifest(t *testing.T) {
	m := newMirror(t, settings{})
	img := upstreamtest.NewImage("a layer")
	m.hub.Push("library/app", "1", img)
	for range 2 {
		for _, c := range []upstreamtest.Content{img.Layers[0], img.Config} {
			if a := m.get("/v2/app/manifests/" + c.Digest.String()); a.status != 404 || a.code(t) != "MANIFEST_UNKNOWN" {
				t.Errorf("a blob as a manifest = %d %s", a.status, a.body)
			}
		}
		m.pull("app", "1", img)
		m.settled()
	}
}
