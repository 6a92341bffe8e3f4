package proxy_test

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/proxy/oci"
	"tidemark/proxy/upstream/upstreamtest"
)

// A name in a request selects an upstream of the configuration and never becomes
// an address: whatever ns, Host and the first component say, nobody else is asked.
func TestNamesOfRequestsAreNeverDialled(t *testing.T) {
	m := newMirror(t, settings{})
	img := upstreamtest.NewImage("layer")
	m.hub.Push("library/app", "1", img)
	bait, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan string, 100)
	srv := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked <- r.URL.String() })}
	go func() { _ = srv.Serve(bait) }()
	t.Cleanup(func() { srv.Close() })
	at := bait.Addr().String()
	_, port, _ := net.SplitHostPort(at)
	for _, ns := range []string{
		"http://" + at, "https://" + at + "/", at, "127.0.0.1:" + port, "[::1]:" + port, "[::ffff:127.0.0.1]:" + port, "0x7f000001:" + port, "2130706433:" + port,
		"localhost:" + port, "user@" + at, "user:password@" + at, "docker.io@" + at, "docker.io:" + port, "docker.io:443", "docker.io/", "docker.io/../x", "docker.io%00." + at,
		"xn--dcker-jua.io", "dоcker.io", "ｄocker.io", "docker.io.", ".docker.io", "docker.io ", " docker.io", "docker.io\r\nHost: " + at, "*", "", "//" + at, "docker.io#@" + at, "docker.io?x=" + at,
		strings.Repeat("a.", 5000) + "io",
	} {
		for _, path := range []string{"/v2/library/app/manifests/1", "/v2/library/app/blobs/" + img.Layers[0].Digest.String(), "/v2/", "/v2/library/app/tags/list", "/v2/library/app/referrers/" + img.Manifest.Digest.String()} {
			a := m.get(path + "?ns=" + escape(ns))
			if a.status != 404 || !strings.Contains(string(a.body), "NAME_UNKNOWN") {
				t.Errorf("GET %s?ns=%.60q = %d %.200s, want 404 NAME_UNKNOWN", path, ns, a.status, a.body)
			}
		}
	}
	for _, host := range []string{at, "evil.example", "docker.io.evil.example", "127.0.0.1:" + port, "[::1]:" + port, "docker.io:1:2"} {
		req := httptest.NewRequest("GET", m.url+"/v2/evil.example/app/manifests/1", nil)
		req.RequestURI, req.Host = "", host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			continue // no request at all
		}
		resp.Body.Close()
		if resp.StatusCode != 404 && resp.StatusCode != 400 {
			t.Errorf("with Host %q it is %d, want 404", host, resp.StatusCode)
		}
	}
	for _, name := range []string{at + "/app", "127.0.0.1/app", "evil.example/app", "localhost/app/x"} {
		a := m.get("/v2/" + name + "/manifests/1")
		if a.status != 404 && a.status != 400 {
			t.Errorf("%s is %d, want a refusal", name, a.status)
		}
	}
	select {
	case u := <-asked:
		t.Errorf("somebody was asked for %s", u)
	default:
	}
	for _, r := range append(m.hub.Requests(), m.ghcr.Requests()...) {
		if strings.Contains(r.Path, "evil.example") || strings.Contains(r.Path, "127.0.0.1") {
			t.Errorf("an upstream was asked for %s", r.Path)
		}
	}
}

// escape is what a query needs, for texts that no query should have.
func escape(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		b.WriteString("%" + string("0123456789ABCDEF"[c>>4]) + string("0123456789ABCDEF"[c&15]))
	}
	return b.String()
}

// What is malformed is told as such, whatever it is part of, and nobody is asked.
func TestMalformedRequestsAskNobody(t *testing.T) {
	m := newMirror(t, settings{})
	hex := digest.FromString("x").Encoded()
	for _, path := range []string{
		"/v2/library/app/referrers/latest", "/v2/library/app/referrers/sha256:" + hex[1:], "/v2/library/app/referrers/md5:" + hex[:32],
		"/v2/_catalog?n=-1", "/v2/_catalog?n=x", "/v2/library/app/tags/list?n=x", "/v2/LIBRARY/app/referrers/sha256:" + hex,
		"/v2/library/app/manifests/1?ns=%zz",
	} {
		if a := m.get(path); a.status != 400 {
			t.Errorf("GET %s = %d %s, want 400", path, a.status, a.body)
		}
	}
	if n := len(m.hub.Requests()); n != 0 {
		t.Errorf("upstream was asked %d times", n)
	}
}

// A signed manifest of schema 1, whose digest is that of what was signed, is passed
// on and kept as it is, and is in the ledger under the digest of its bytes.
func TestSchema1IsPassedOn(t *testing.T) {
	m := newMirror(t, settings{})
	payload := "{\n   \"schemaVersion\": 1,\n   \"name\": \"library/old\",\n   \"fsLayers\": []\n}"
	cut := strings.LastIndex(payload, "\n}")
	protected := fmt.Sprintf(`{"formatLength":%d,"formatTail":%q}`, cut, base64.RawURLEncoding.EncodeToString([]byte(payload[cut:])))
	body := payload[:cut] + fmt.Sprintf(",\n   \"signatures\": [{\"protected\":%q}]\n}", base64.RawURLEncoding.EncodeToString([]byte(protected)))
	m.hub.PushManifest("library/old", "1", upstreamtest.Content{MediaType: oci.DockerSchema1JWS, Digest: digest.FromString(payload), Body: []byte(body)})
	for range 2 {
		a := m.get("/v2/library/old/manifests/1")
		if a.status != 200 || string(a.body) != body || a.header.Get("Content-Type") != oci.DockerSchema1JWS || a.header.Get("Docker-Content-Digest") != digest.FromString(body).String() {
			t.Errorf("it is %d %v %s", a.status, a.header, a.body)
		}
	}
	entries, err := m.store.Events(t.Context(), audit.EventQuery{})
	if err != nil || len(entries) != 1 || !strings.Contains(string(entries[0].Leaf), digest.FromString(body).String()) {
		t.Errorf("the ledger has %d events, %v; want the first sight of it", len(entries), err)
	}
}
