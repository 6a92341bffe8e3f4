package upstream_test

import (
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tidemark/proxy/upstream"
	"tidemark/proxy/upstream/upstreamtest"
)

// A host that a blob is redirected to gets the range that was asked for but no
// credentials, whatever upstream itself wanted. Upstream and the host are both
// on loopback here, which is why the redirect may lead there.
func TestRedirectedHostGetsNoCredentials(t *testing.T) {
	for _, c := range []struct {
		name    string
		require func(*upstreamtest.Registry)
	}{
		{"basic", func(r *upstreamtest.Registry) { r.RequireBasic(user, password) }},
		{"bearer", func(r *upstreamtest.Registry) { r.RequireToken(user, password, time.Minute) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := newRegistry(t)
			img := upstreamtest.NewImage("0123456789")
			reg.Push("app", "1", img)
			c.require(reg)
			hub := open(upstream.Options{Credentials: upstream.Static(user, password)}, reg.URL())
			if err := head(t, hub, "app"); err != nil {
				t.Fatal(err)
			}
			reg.Reset()
			reg.Break(upstreamtest.Fault{Name: upstreamtest.Redirect, Path: "/blobs/"})

			for range 2 {
				blob, err := hub.GetBlob(t.Context(), "app", img.Layers[0].Digest, 4, -1)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := io.ReadAll(blob.Body); err != nil || string(got) != "456789" || blob.Offset != 4 {
					t.Errorf("blob = %q from %d, %v; want 456789 from 4", got, blob.Offset, err)
				}
				blob.Body.Close()
			}
			asked := reg.Requests()
			if len(asked) != 4 {
				t.Fatalf("%d requests, want 2 to upstream and 2 to where it redirects", len(asked))
			}
			for _, q := range asked {
				home := q.Host == reg.URL().Host
				if got := q.Authorization != ""; got != home {
					t.Errorf("request to %s has credentials: %v, want %v", q.Host, got, home)
				}
				if q.Range != "bytes=4-" {
					t.Errorf("request to %s has Range %q, want bytes=4-", q.Host, q.Range)
				}
			}
		})
	}
}

// Redirects that lead nowhere end after five, as nonsense.
func TestRedirectLoopEnds(t *testing.T) {
	var asked atomic.Int32
	addr := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, fmt.Sprintf("/again/%d?signature=secret-signature", asked.Add(1)), http.StatusFound)
	})
	_, err := open(upstream.Options{}, addr).GetManifest(t.Context(), "app", "1")
	if ue := refusal(t, err); !ue.Nonsense || ue.Status != 0 || !strings.Contains(ue.Error(), "more than 5 redirects") {
		t.Errorf("error = %v, want nonsense about redirects", ue)
	}
	withoutSecrets(t, err)
	if got := asked.Load(); got != 6 {
		t.Errorf("%d requests, want the first and 5 redirects", got)
	}
}

// A redirect from https to http is not followed: what comes in clear could come
// from anyone, and the signature in its address would be there for all to read.
func TestRedirectOutOfTLSIsRefused(t *testing.T) {
	var asked atomic.Int32
	clear := newServer(t, func(http.ResponseWriter, *http.Request) { asked.Add(1) })
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, clear.String()+"/blob?signature=secret-signature", http.StatusFound)
	}))
	t.Cleanup(srv.Close)
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())

	_, err := open(upstream.Options{RootCAs: roots}, parse(t, srv.URL)).GetManifest(t.Context(), "app", "1")
	if ue := refusal(t, err); !ue.Nonsense || !strings.Contains(ue.Error(), "redirect from https to http") {
		t.Errorf("error = %v, want nonsense about a redirect out of https", ue)
	}
	withoutSecrets(t, err)
	if got := asked.Load(); got != 0 {
		t.Errorf("the server without TLS was asked %d times, want 0", got)
	}
}

// A signed address gives whoever reads it the blob. It does not get into an
// error text, however the host behind it fails.
func TestSignedAddressStaysOutOfErrors(t *testing.T) {
	for _, c := range []struct {
		name   string
		fault  upstreamtest.Fault
		status int
	}{
		{"refuses", upstreamtest.Fault{Name: upstreamtest.Status, At: 403}, 403},
		{"fails", upstreamtest.Fault{Name: upstreamtest.Status, At: 500}, 500},
		{"hangs", upstreamtest.Fault{Name: upstreamtest.Hang}, 0},
		{"breaks off", upstreamtest.Fault{Name: upstreamtest.Cut, At: 3}, 0},
		{"stalls", upstreamtest.Fault{Name: upstreamtest.Stall, At: 3}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			reg := newRegistry(t)
			img := upstreamtest.NewImage("0123456789")
			reg.Push("app", "1", img)
			reg.Break(upstreamtest.Fault{Name: upstreamtest.Redirect})
			reg.Break(c.fault)
			hub := open(upstream.Options{HeaderTimeout: 100 * time.Millisecond, IdleTimeout: 100 * time.Millisecond}, reg.URL())

			_, err := hub.GetManifest(t.Context(), "app", "1")
			if ue := refusal(t, err); ue.Status != c.status || ue.Op != "GET /v2/app/manifests/1" {
				t.Errorf("manifest: %v, want status %d of what upstream was asked", ue, c.status)
			}
			withoutSecrets(t, err)
			withoutSecrets(t, fmt.Errorf("%s", hub.Health().LastError))

			blob, err := hub.GetBlob(t.Context(), "app", img.Layers[0].Digest, 0, -1)
			if err == nil {
				_, err = io.ReadAll(blob.Body)
				blob.Body.Close()
			}
			if err == nil {
				t.Error("the blob arrived whole")
			}
			withoutSecrets(t, err)
		})
	}
	t.Run("is down", func(t *testing.T) {
		down := httptest.NewServer(nil)
		hub := open(upstream.Options{}, newServer(t, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, down.URL+"/blob?signature=secret-signature", http.StatusFound)
		}))
		down.Close() // not before: the other would get its port
		err := head(t, hub, "app")
		if ue := refusal(t, err); ue.Status != 0 || ue.Nonsense {
			t.Errorf("error = %v, want silence", ue)
		}
		withoutSecrets(t, err)
	})
}
