package intercept

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/rs/zerolog"

	"tidemark/proxy/ca"
	"tidemark/proxy/front"
)

// patience bounds the wait for something that must happen.
const patience = 10 * time.Second

// hosts are what the proxies of these tests answer for.
var hosts = []string{"ghcr.io", "quay.io", "hub.example:8443", "10.1.2.3:5000", "localhost:5000"}

// An arrived is a request as the handler behind the proxy sees it.
type arrived struct {
	method, host, path, proto string
	who                       Client
	named                     bool // that it came through the proxy
	header                    http.Header
}

// A running is a proxy with the server that answers what it hands out, joined as
// cmd/tidemark joins them.
type running struct {
	*Proxy
	t     *testing.T
	addr  string
	roots *x509.CertPool // of its CA
	got   chan arrived
	stop  func() error // ends both, and tells what Run returned
}

// run starts a proxy on loopback; the test need not stop it.
func run(t *testing.T, o Options) *running {
	t.Helper()
	r := &running{t: t, got: make(chan arrived, 1000), roots: x509.NewCertPool()}
	o.Addr, o.Hosts, o.CA = "127.0.0.1:0", hosts, authority(t)
	r.roots.AppendCertsFromPEM(o.CA.PEM())
	r.Proxy = New(o)
	if err := r.Listen(); err != nil {
		t.Fatal(err)
	}
	r.addr = r.Address().String()
	inner := front.New(front.Options{
		Listener: r.Proxy, TLS: r.TLS(), ConnContext: Context, Log: zerolog.Nop(), Drain: time.Second,
		Handler: Only(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			who, named := ClientOf(q.Context())
			r.got <- arrived{q.Method, q.Host, q.URL.Path, q.Proto, who, named, q.Header.Clone()}
			_, _ = io.Copy(w, q.Body)
			fmt.Fprint(w, "answered here")
		})),
	})
	if err := inner.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- r.Run(ctx) }()
	go func() { ended <- inner.Run(ctx) }()
	r.stop = sync.OnceValue(func() error {
		cancel()
		return errors.Join(<-ended, <-ended)
	})
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("Run = %v, want nil", err)
		}
	})
	return r
}

// authority is one CA for all tests of a run, which can sign for all hosts.
func authority(t testing.TB) *ca.Authority {
	t.Helper()
	a, err := ca.Open(t.TempDir(), "intercept", CertificateHosts(hosts)...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// client is a client that was told to use the proxy, and to trust its CA.
func (r *running) client(h2 bool, login *url.Userinfo) *http.Client {
	tr := &http.Transport{
		Proxy:             http.ProxyURL(&url.URL{Scheme: "http", Host: r.addr, User: login}),
		TLSClientConfig:   &tls.Config{RootCAs: r.roots},
		ForceAttemptHTTP2: h2,
	}
	r.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

// connect asks for a connection in the words given, and returns the answer and the
// connection, which is closed at the end of the test.
func (r *running) connect(request string) (*http.Response, *tunnelled) {
	r.t.Helper()
	raw, err := net.Dial("tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { raw.Close() })
	_ = raw.SetDeadline(time.Now().Add(patience))
	go func() { _, _ = io.WriteString(raw, request) }() // it may be refused half-way
	br := bufio.NewReader(raw)
	resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodConnect})
	if err != nil {
		r.t.Fatalf("%.200q: %v", request, err)
	}
	return resp, &tunnelled{raw.(*net.TCPConn), br}
}

// to connects to a target, which must be granted.
func (r *running) to(target string) *tunnelled {
	r.t.Helper()
	resp, c := r.connect("CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\n\r\n")
	if resp.StatusCode != http.StatusOK {
		r.t.Fatalf("CONNECT %s = %d, want 200", target, resp.StatusCode)
	}
	return c
}

// A tunnelled is a connection behind the answer to CONNECT.
type tunnelled struct {
	*net.TCPConn
	buffered *bufio.Reader
}

func (c *tunnelled) Read(p []byte) (int, error) { return c.buffered.Read(p) }

// body is the text of an answer to CONNECT that is none of a connection.
func body(t *testing.T, resp *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// next waits for what must arrive.
func next[T any](t *testing.T, from <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatalf("no %s within %v", what, patience)
		panic("unreachable")
	}
}

// A client that is told to use the proxy reaches each host under the host's own
// name, in HTTP/1.1 and in HTTP/2, and the handler is told which it is.
func TestClientReachesEachHostUnderItsOwnName(t *testing.T) {
	r := run(t, Options{})
	for _, h2 := range []bool{false, true} {
		for _, c := range []struct{ url, host string }{
			{"https://ghcr.io/v2/", "ghcr.io"},
			{"https://quay.io/v2/", "quay.io"},
			{"https://ghcr.io:443/v2/", "ghcr.io"},
			{"https://GHCR.io/v2/", "ghcr.io"},
			{"https://hub.example:8443/v2/", "hub.example:8443"},
			{"https://10.1.2.3:5000/v2/", "10.1.2.3:5000"}, // a client sends no server name for an address
			{"https://localhost:5000/v2/", "localhost:5000"},
		} {
			resp, err := r.client(h2, nil).Post(c.url, "text/plain", strings.NewReader("asked, "))
			if err != nil {
				t.Errorf("%s, HTTP/2 %t: %v", c.url, h2, err)
				continue
			}
			got, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != 200 || string(got) != "asked, answered here" {
				t.Errorf("%s = %d %q, %v; want what the handler says", c.url, resp.StatusCode, got, err)
			}
			proto := "HTTP/1.1"
			if h2 {
				proto = "HTTP/2.0"
			}
			a := next(t, r.got, "request")
			if !strings.EqualFold(strings.TrimSuffix(a.host, ":443"), c.host) || a.path != "/v2/" || a.proto != proto || a.method != "POST" || a.who != (Client{}) || !a.named {
				t.Errorf("%s arrives as %+v, want %s to %s", c.url, a, proto, c.host)
			}
		}
	}
}

// One connection carries many requests at once, and all arrive.
func TestConnectionIsUsedForManyRequests(t *testing.T) {
	r := run(t, Options{})
	c := r.client(true, nil)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			resp, err := c.Get("https://ghcr.io/v2/")
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		})
	}
	wg.Wait()
	if got := len(r.got); got != 50 {
		t.Errorf("%d requests arrived, want 50", got)
	}
}

// handshake speaks TLS on a connection and returns what the proxy presents.
func handshake(c net.Conn, cfg *tls.Config) (tls.ConnectionState, *tls.Conn, error) {
	tc := tls.Client(c, cfg)
	err := tc.HandshakeContext(context.Background())
	return tc.ConnectionState(), tc, err
}

// A certificate is made once for each host, is good for this host only and for a
// few days, and verifies with the CA that clients were given.
func TestCertificateIsMintedOnceForEachHost(t *testing.T) {
	r := run(t, Options{})
	serials := make(map[string]string)
	for _, c := range []struct{ target, name string }{{"ghcr.io:443", "ghcr.io"}, {"quay.io:443", "quay.io"}, {"hub.example:8443", "hub.example"}, {"10.1.2.3:5000", "10.1.2.3"}} {
		var mu sync.Mutex
		seen := make(map[string]bool)
		var wg sync.WaitGroup
		conns := make([]*tunnelled, 8)
		for i := range conns {
			conns[i] = r.to(c.target)
		}
		for _, conn := range conns {
			wg.Go(func() {
				state, _, err := handshake(conn, &tls.Config{RootCAs: r.roots, ServerName: c.name})
				if err != nil {
					t.Errorf("%s: %v", c.target, err)
					return
				}
				leaf := state.PeerCertificates[0]
				mu.Lock()
				defer mu.Unlock()
				seen[leaf.SerialNumber.String()] = true
				if names := append(slices.Clone(leaf.DNSNames), addresses(leaf)...); !slices.Equal(names, []string{c.name}) || leaf.IsCA || time.Until(leaf.NotAfter) > 8*24*time.Hour {
					t.Errorf("the certificate for %s is for %q, until %v, CA %t; want this name, a week, no CA", c.target, names, leaf.NotAfter, leaf.IsCA)
				}
			})
		}
		wg.Wait()
		if len(seen) != 1 {
			t.Errorf("%s has %d certificates, want 1", c.target, len(seen))
		}
		for s := range seen {
			if other, taken := serials[s]; taken {
				t.Errorf("%s and %s have one certificate", other, c.target)
			}
			serials[s] = c.target
		}
	}
}

func addresses(c *x509.Certificate) (all []string) {
	for _, ip := range c.IPAddresses {
		all = append(all, ip.String())
	}
	return all
}

// A request on a connection to one host that names another is misdirected, in
// whatever way it names it, and does not reach the handler.
func TestRequestForAnotherHostIsMisdirected(t *testing.T) {
	r := run(t, Options{})
	for _, c := range []struct {
		host string
		ok   bool
	}{
		{"ghcr.io", true}, {"GHCR.IO", true}, {"ghcr.io:443", true},
		{"quay.io", false}, {"ghcr.io:80", false}, {"ghcr.io:8443", false}, {"ghcr.io.", false}, {"x.ghcr.io", false}, {"ghcr.iox", false},
		{"127.0.0.1", false}, {"[::1]:443", false}, {"localhost", false}, {"169.254.169.254", false}, {"ghcr.io@quay.io", false}, {"quay.io@ghcr.io", false},
	} {
		want := map[bool]int{true: 200, false: http.StatusMisdirectedRequest}[c.ok]
		for _, h2 := range []bool{false, true} {
			req, err := http.NewRequest("GET", "https://ghcr.io/v2/", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = c.host
			resp, err := r.client(h2, nil).Do(req)
			if err != nil {
				if c.ok || !strings.ContainsRune(c.host, '@') {
					t.Errorf("Host %s, HTTP/2 %t: %v", c.host, h2, err)
				}
				continue // it is no host, and was not sent or not taken
			}
			text := body(t, resp)
			resp.Body.Close()
			if resp.StatusCode != want && (c.ok || resp.StatusCode != http.StatusBadRequest) {
				t.Errorf("Host %s, HTTP/2 %t = %d %s, want %d", c.host, h2, resp.StatusCode, text, want)
			}
		}
		if got := len(r.got); got != 0 != c.ok {
			t.Errorf("Host %s: %d requests reached the handler", c.host, got)
		}
		for len(r.got) > 0 {
			<-r.got
		}
	}
}

// What a request of HTTP/1.1 can say besides, or instead of, one Host header does
// not lead it to another host either.
func TestOddRequestsStayOnTheirHost(t *testing.T) {
	r := run(t, Options{})
	for _, request := range []string{
		"GET https://quay.io/v2/ HTTP/1.1\r\nHost: ghcr.io\r\n\r\n",
		"GET http://127.0.0.1/v2/ HTTP/1.1\r\nHost: ghcr.io\r\n\r\n",
		"GET /v2/ HTTP/1.1\r\nHost: ghcr.io\r\nHost: quay.io\r\n\r\n",
		"GET /v2/ HTTP/1.1\r\nHost: quay.io\r\nHost: ghcr.io\r\n\r\n",
		"GET /v2/ HTTP/1.1\r\nHost:\r\n\r\n",
		"GET /v2/ HTTP/1.1\r\n\r\n",
		"GET /v2/ HTTP/1.0\r\n\r\n",
		"CONNECT quay.io:443 HTTP/1.1\r\nHost: quay.io:443\r\n\r\n",
		"GET /v2/ HTTP/1.1\r\nHost: ghcr.io, quay.io\r\n\r\n",
	} {
		_, c, err := handshake(r.to("ghcr.io:443"), &tls.Config{RootCAs: r.roots, ServerName: "ghcr.io"})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, request)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || resp.StatusCode != http.StatusMisdirectedRequest && resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%q = %v, %v; want 421 or 400", request, resp, err)
		}
		if len(r.got) != 0 {
			t.Fatalf("%q reached the handler as %+v", request, <-r.got)
		}
	}
}

// A client that asks for the certificate of another host than the one it is
// connected to gets none, be the other one configured or not.
func TestServerNameOfAnotherHostFailsTheHandshake(t *testing.T) {
	r := run(t, Options{})
	for _, c := range []struct {
		target, name string
		ok           bool
	}{
		{"ghcr.io:443", "ghcr.io", true}, {"ghcr.io:443", "GHCR.IO", true}, {"ghcr.io:443", "", true}, {"10.1.2.3:5000", "", true},
		{"ghcr.io:443", "quay.io", false}, {"ghcr.io:443", "evil.example", false}, {"ghcr.io:443", "x.ghcr.io", false}, {"quay.io:443", "ghcr.io", false}, {"10.1.2.3:5000", "ghcr.io", false},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			_, _, err := handshake(r.to(c.target), &tls.Config{ServerName: c.name, InsecureSkipVerify: true, MinVersion: version, MaxVersion: version})
			if (err == nil) != c.ok {
				t.Errorf("connected to %s, a handshake for %q in %s: %v, want success %t", c.target, c.name, tls.VersionName(version), err, c.ok)
			}
		}
	}
	_, _, err := handshake(r.to("ghcr.io:443"), &tls.Config{RootCAs: r.roots, ServerName: "ghcr.io", MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10})
	if err == nil {
		t.Error("TLS 1.1 is spoken, want it refused")
	}
}

// A session that began with one host is not taken up on a connection to another:
// the rule about names counts for it, too.
func TestSessionOfOneHostIsNotTakenUpAtAnother(t *testing.T) {
	r := run(t, Options{})
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		cfg := &tls.Config{RootCAs: r.roots, ServerName: "ghcr.io", ClientSessionCache: tls.NewLRUClientSessionCache(8), MinVersion: version, MaxVersion: version}
		for i := range 2 {
			state, c, err := handshake(r.to("ghcr.io:443"), cfg)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(c, "GET /v2/ HTTP/1.1\r\nHost: ghcr.io\r\n\r\n")
			if _, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil { // the ticket is read with it
				t.Fatal(err)
			}
			if i == 1 && !state.DidResume {
				t.Logf("%s: a session is not taken up at its own host", tls.VersionName(version))
			}
		}
		if state, _, err := handshake(r.to("quay.io:443"), cfg); err == nil {
			t.Errorf("%s: connected to quay.io, a handshake for ghcr.io succeeds, resumed %t", tls.VersionName(version), state.DidResume)
		}
	}
}

// A bait is a listener beside the proxy that nobody may be led to.
type bait struct {
	port string
	hits atomic.Int32
}

func newBait(t testing.TB) *bait {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	b := new(bait)
	_, b.port, _ = net.SplitHostPort(ln.Addr().String())
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			b.hits.Add(1)
			c.Close()
		}
	}()
	return b
}

// An address is not also said to be a name: OpenSSL takes a common name for one where
// there is no other, and the authority may not sign for it.
func TestCertificateOfAnAddressNamesNoHost(t *testing.T) {
	r := run(t, Options{})
	state, _, err := handshake(r.to("10.1.2.3:5000"), &tls.Config{RootCAs: r.roots, ServerName: "10.1.2.3"})
	if err != nil {
		t.Fatal(err)
	}
	if leaf := state.PeerCertificates[0]; leaf.Subject.CommonName != "" || len(leaf.DNSNames) != 0 {
		t.Errorf("the certificate of an address is for the names %q and %q, want none", leaf.Subject.CommonName, leaf.DNSNames)
	}
}

// Whatever is not configured is refused, with what the operator can do about it,
// and nobody is asked for it: names and addresses of this machine and beside it,
// other ports, and all that only looks like a host that is configured.
func TestWhatIsNotConfiguredIsRefused(t *testing.T) {
	b := newBait(t)
	r := run(t, Options{Tunnel: []string{"auth.docker.io", "10.0.0.1:22"}})
	for _, target := range []string{
		"127.0.0.1:80", "127.0.0.1:BAIT", "localhost:443", "localhost:BAIT", "[::1]:443", "[::1]:BAIT", "[::ffff:127.0.0.1]:443", "[::ffff:127.0.0.1]:BAIT",
		"0.0.0.0:443", "0.0.0.0:BAIT", "[::]:BAIT", "127.1:BAIT", "2130706433:BAIT", "0x7f000001:BAIT", "017700000001:BAIT", "localhost.:BAIT",
		"169.254.169.254:80", "metadata.google.internal:80", "[fe80::1%25lo]:443",
		"ghcr.io:80", "ghcr.io:22", "ghcr.io:0", "ghcr.io:65536", "ghcr.io:0443", "ghcr.io.:443", "ghcr.io", "ghcr.io:", ":443", "x.ghcr.io:443", "xghcr.io:443", "ghcr.io.evil.example:443",
		"hub.example:443", "hub.example", "quay.io:8443", "auth.docker.io:80", "auth.docker.io", "10.0.0.1:443", "10.0.0.1", "[10.0.0.1]:22", "[::ffff:10.0.0.1]:22", "10.1.2.3:443",
		"user@ghcr.io:443", "user:password@ghcr.io:443", "ghcr.io:443@127.0.0.1:BAIT", "127.0.0.1:BAIT@ghcr.io:443", "@ghcr.io:443",
		"ghcr.io:443/", "ghcr.io:443/../x", "ghcr.io:443?x", "ghcr.io:443#x", "http://ghcr.io:443", "https://ghcr.io:443/", "//ghcr.io:443", "/ghcr.io:443", "/", "*",
		"xn--ghcr-0na.io:443", "ghcr\u00b7io:443", "ｇｈｃｒ.io:443", "gh%63r.io:443", "ghcr.io%00:443", "ghcr.io\x00:443", "ghcr.io\t:443", "127.0.0.1:BAIT#ghcr.io:443",
		strings.Repeat("a", 300) + ":443", strings.Repeat("a.", 20_000) + "io:443", "ghcr.io:443" + strings.Repeat("3", 1000), "evil.example:443", "",
	} {
		target = strings.ReplaceAll(target, "BAIT", b.port)
		for _, host := range []string{target, "ghcr.io:443"} { // the Host header says nothing
			resp, _ := r.connect("CONNECT " + target + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n")
			if resp.StatusCode == http.StatusOK { // and has no body that ends
				t.Errorf("CONNECT %.100q with Host %.50q is granted, want 403", target, host)
				continue
			}
			switch text := body(t, resp); {
			case resp.StatusCode == http.StatusForbidden:
				if !strings.Contains(text, "registry.intercept.tunnel") || len(text) > 3000 {
					t.Errorf("CONNECT %.100q is refused with %d bytes %.500q, want a few that name registry.intercept.tunnel", target, len(text), text)
				}
			case resp.StatusCode != http.StatusBadRequest && resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge: // no address at all
				t.Errorf("CONNECT %.100q with Host %.50q = %d %.200s, want 403", target, host, resp.StatusCode, text)
			}
		}
	}
	if n := b.hits.Load(); n != 0 {
		t.Errorf("what is beside the proxy was asked %d times, want 0", n)
	}
	if len(r.got) != 0 {
		t.Errorf("a request arrived: %+v", <-r.got)
	}
	r.to("GHCR.io:443") // is
}

// The targets of the task's own words are 403, not merely anything but 200.
func TestRefusalIsForbidden(t *testing.T) {
	r := run(t, Options{})
	for _, target := range []string{
		"127.0.0.1:80", "localhost:443", "[::1]:443", "[::ffff:127.0.0.1]:443", "0.0.0.0:443", "169.254.169.254:80",
		"ghcr.io:80", "ghcr.io:22", "ghcr.io.:443", "ghcr.io", "xn--ghcr-0na.io:443", strings.Repeat("a", 300) + ":443",
	} {
		resp, _ := r.connect("CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\n\r\n")
		if text := body(t, resp); resp.StatusCode != http.StatusForbidden || !strings.Contains(text, "registry.intercept.tunnel") {
			t.Errorf("CONNECT %.50s = %d %s, want 403 that names registry.intercept.tunnel", target, resp.StatusCode, text)
		}
	}
}

// The proxy is for CONNECT: a request for plain HTTP, to whomever, is refused and
// not passed on.
func TestPlainHTTPIsRefused(t *testing.T) {
	b := newBait(t)
	r := run(t, Options{Tunnel: []string{"127.0.0.1:" + b.port}})
	for _, c := range []struct{ method, url string }{
		{"GET", "http://ghcr.io/"}, {"POST", "http://ghcr.io/v2/"}, {"GET", "http://127.0.0.1:" + b.port + "/"}, {"HEAD", "http://quay.io/"},
	} {
		req, err := http.NewRequest(c.method, c.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := r.client(false, nil).Do(req)
		if err != nil {
			t.Errorf("%s %s: %v", c.method, c.url, err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusForbidden {
			t.Errorf("%s %s = %d, want 403", c.method, c.url, resp.StatusCode)
		}
	}
	for _, line := range []string{"GET /v2/", "GET https://ghcr.io/v2/", "connect ghcr.io:443", "PUT ftp://ghcr.io/"} {
		resp, _ := r.connect(line + " HTTP/1.1\r\nHost: ghcr.io\r\n\r\n")
		if resp.StatusCode != http.StatusForbidden && resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s = %d, want 403", line, resp.StatusCode)
		}
	}
	if b.hits.Load() != 0 || len(r.got) != 0 {
		t.Error("a request for plain HTTP was passed on")
	}
}

// listenRaw serves raw connections to a host that is tunnelled to.
func listenRaw(t testing.TB, serve func(*net.TCPConn)) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(patience))
				serve(c.(*net.TCPConn))
			})
		}
	})
	return ln.Addr().String()
}

// echo sends back what it gets, as it comes.
func echo(c *net.TCPConn) { _, _ = io.Copy(c, c) }

// What is tunnelled is not touched: the TLS of the far server reaches the client
// with the far server's own certificate, and megabytes pass both ways.
func TestTunnelIsNotTouched(t *testing.T) {
	far := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) { _, _ = io.Copy(w, q.Body) }))
	far.EnableHTTP2 = true
	far.StartTLS()
	defer far.Close()
	r := run(t, Options{Tunnel: []string{far.Listener.Addr().String()}})
	roots := x509.NewCertPool()
	roots.AddCert(far.Certificate())
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	for _, h2 := range []bool{false, true} {
		c := r.client(h2, nil)
		c.Transport.(*http.Transport).TLSClientConfig.RootCAs = roots
		resp, err := c.Post(far.URL, "text/plain", bytes.NewReader(sent))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d bytes came back, %v; want all %d", len(got), err, len(sent))
		}
		if !resp.TLS.PeerCertificates[0].Equal(far.Certificate()) || (resp.ProtoMajor == 2) != h2 {
			t.Errorf("the client speaks %s with %v, want the far server itself", resp.Proto, resp.TLS.PeerCertificates[0].Subject)
		}
	}
	if len(r.got) != 0 {
		t.Error("what was tunnelled reached the handler")
	}
}

// Who has no more to say can still listen: the end of one direction is passed on
// as such, whichever it is.
func TestTunnelPassesOnTheEndOfOneDirection(t *testing.T) {
	t.Run("the client has no more to send", func(t *testing.T) {
		far := listenRaw(t, func(c *net.TCPConn) {
			all, err := io.ReadAll(c) // answers when it has everything
			if err == nil {
				fmt.Fprintf(c, "%d bytes", len(all))
			}
		})
		c := run(t, Options{Tunnel: []string{far}}).to(far)
		fmt.Fprint(c, "hello")
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != "5 bytes" {
			t.Errorf("the far side answers %q, %v; want that it had 5 bytes", got, err)
		}
	})
	t.Run("the far side has no more to send", func(t *testing.T) {
		got := make(chan string, 1)
		far := listenRaw(t, func(c *net.TCPConn) {
			fmt.Fprint(c, "no more from me")
			_ = c.CloseWrite()
			all, err := io.ReadAll(c)
			got <- fmt.Sprint(string(all), err)
		})
		c := run(t, Options{Tunnel: []string{far}}).to(far)
		if all, err := io.ReadAll(c); err != nil || string(all) != "no more from me" {
			t.Fatalf("the far side says %q, %v", all, err)
		}
		fmt.Fprint(c, "but from me")
		_ = c.CloseWrite()
		if all := next(t, got, "word of the client"); all != "but from me<nil>" {
			t.Errorf("the far side gets %q, want what the client said", all)
		}
	})
}

// A tunnel ends when either side is gone, when the proxy ends, and not before.
func TestTunnelEndsWithTheProxy(t *testing.T) {
	ends := make(chan error, 10)
	far := listenRaw(t, func(c *net.TCPConn) {
		_ = c.SetDeadline(time.Now().Add(2 * patience))
		_, err := io.Copy(c, c)
		ends <- err
	})
	r := run(t, Options{Tunnel: []string{far}})
	c := r.to(far)
	ask := func() {
		t.Helper()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	ask()
	gone := r.to(far)
	gone.Close()
	next(t, ends, "end at the far side of a client that left")
	ask()
	if err := r.stop(); err != nil {
		t.Errorf("Run = %v, want nil", err)
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("once the proxy has ended, a tunnel reads %d bytes, %v; want its end", n, err)
	}
	next(t, ends, "end at the far side")
}

// A far side that cannot be reached, or takes no connection, is told as such.
func TestTunnelToNobodyIsToldSo(t *testing.T) {
	far := listenRaw(t, echo)
	const down = "127.0.0.1:1" // not a port that was free just now: somebody may have it by now
	r := run(t, Options{Tunnel: []string{far, down}})
	resp, _ := r.connect("CONNECT " + down + " HTTP/1.1\r\nHost: " + down + "\r\n\r\n")
	if text := body(t, resp); resp.StatusCode != http.StatusBadGateway || !strings.Contains(text, down) {
		t.Errorf("CONNECT to nobody = %d %s, want 502 that names it", resp.StatusCode, text)
	}
	c := r.to(far)
	fmt.Fprint(c, "x")
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("another tunnel, afterwards: %v", err)
	}
}

// A name that is listed means what a name server says, which may be this machine:
// it is not connected to. An address that is listed is meant.
func TestNameThatLeadsToThisMachineIsRefused(t *testing.T) {
	for _, c := range []struct {
		target, resolved string
		ok               bool
	}{
		{"auth.docker.io:443", "127.0.0.1:443", false}, {"auth.docker.io:443", "127.8.8.8:443", false}, {"auth.docker.io:443", "[::1]:443", false},
		{"auth.docker.io:443", "[::ffff:127.0.0.1]:443", false}, {"auth.docker.io:443", "169.254.169.254:443", false}, {"auth.docker.io:443", "[fe80::1]:443", false},
		{"auth.docker.io:443", "[::ffff:169.254.169.254]:443", false}, {"auth.docker.io:443", "0.0.0.0:443", false}, {"auth.docker.io:443", "[::]:443", false},
		{"auth.docker.io:443", "[::ffff:0.0.0.0]:443", false}, {"auth.docker.io:443", "224.0.0.1:443", false}, {"auth.docker.io:443", "[ff02::1]:443", false},
		{"auth.docker.io:443", "not an address", false}, {"localhost.localdomain:443", "127.0.0.1:443", false}, {"localhost.example:443", "127.0.0.1:443", false},
		{"127.0.0.1.example:443", "127.0.0.1:443", false}, {"2130706433:443", "127.0.0.1:443", false}, {"127.1:443", "127.0.0.1:443", false},
		{"auth.docker.io:443", "198.51.100.7:443", true}, {"auth.docker.io:443", "[2001:db8::7]:443", true}, {"auth.corp.example:443", "10.0.0.7:443", true},
		{"localhost:443", "127.0.0.1:443", true}, {"127.0.0.1:443", "127.0.0.1:443", true}, {"[::1]:443", "[::1]:443", true}, {"169.254.1.1:443", "169.254.1.1:443", true},
	} {
		var err error
		if control := elsewhere(c.target); control != nil {
			err = control("tcp", c.resolved, nil)
		}
		if (err == nil) != c.ok {
			t.Errorf("%s that is %s: %v, want allowed %t", c.target, c.resolved, err, c.ok)
		}
	}

	const name = "auth.example"
	b := newBait(t)
	r := run(t, Options{Tunnel: []string{name + ":" + b.port}, Resolver: everythingIsHere(t)})
	resp, _ := r.connect("CONNECT " + name + ":" + b.port + " HTTP/1.1\r\nHost: " + name + "\r\n\r\n")
	if text := body(t, resp); resp.StatusCode != http.StatusBadGateway || !strings.Contains(text, "this machine") {
		t.Errorf("CONNECT to %s = %d %s, want 502 that says why", name, resp.StatusCode, text)
	}
	if n := b.hits.Load(); n != 0 {
		t.Errorf("%s was connected to %d times, want 0", name, n)
	}
}

// everythingIsHere resolves every name to this machine.
func everythingIsHere(t *testing.T) *net.Resolver {
	t.Helper()
	dns, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dns.Close() })
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := dns.ReadFrom(buf)
			if err != nil {
				return // the test has ended
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			m.Response, m.Additionals = true, nil
			if q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class},
					Body:   &dnsmessage.AResource{A: [4]byte{127, 0, 0, 1}},
				}}
			}
			if answer, err := m.Pack(); err == nil {
				_, _ = dns.WriteTo(answer, from) // who asked asks again
			}
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", dns.LocalAddr().String())
	}}
}

// An impatient sends CONNECT and the first of what follows in one piece, and takes
// the answer to CONNECT off what it reads first.
type impatient struct {
	net.Conn
	first string
	in    io.Reader
}

func (c *impatient) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(append([]byte(c.first), p...))
	n = max(0, n-len(c.first))
	c.first = ""
	return n, err
}

func (c *impatient) Read(p []byte) (int, error) {
	if c.in == nil {
		br := bufio.NewReader(c.Conn)
		resp, err := http.ReadResponse(br, &http.Request{Method: http.MethodConnect})
		if err != nil || resp.StatusCode != http.StatusOK {
			return 0, fmt.Errorf("CONNECT: %v, %v", resp, err)
		}
		c.in = br
	}
	return c.in.Read(p)
}

// What a client sends before it is told that it is connected is not lost, nor read
// in another order, however much it is.
func TestWhatIsSentEarlyIsNotLost(t *testing.T) {
	far := listenRaw(t, echo)
	r := run(t, Options{Tunnel: []string{far}})
	dial := func(target string) *impatient {
		raw, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { raw.Close() })
		_ = raw.SetDeadline(time.Now().Add(patience))
		return &impatient{Conn: raw, first: "CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\n\r\n"}
	}
	for _, size := range []int{1, 100, 4096, 5000, 1 << 20} {
		var sent bytes.Buffer
		for i := 0; sent.Len() < size; i++ {
			fmt.Fprintf(&sent, "%d ", i)
		}
		c := dial(far)
		go func() { _, _ = c.Write(sent.Bytes()) }()
		got := make([]byte, sent.Len())
		if _, err := io.ReadFull(c.later(), got); err != nil || !bytes.Equal(got, sent.Bytes()) {
			t.Errorf("of %d bytes that were sent early, %v, the same: %t", sent.Len(), err, bytes.Equal(got, sent.Bytes()))
		}
	}
	for range 20 {
		_, c, err := handshake(dial("ghcr.io:443"), &tls.Config{RootCAs: r.roots, ServerName: "ghcr.io"})
		if err != nil {
			t.Fatalf("a handshake that was begun early: %v", err)
		}
		fmt.Fprint(c, "GET /v2/ HTTP/1.1\r\nHost: ghcr.io\r\n\r\n")
		if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("a request after it: %v, %v", resp, err)
		}
		next(t, r.got, "request")
	}
}

// later is c for a reader beside the one who writes: the answer to CONNECT is
// there when something else is.
func (c *impatient) later() io.Reader { return &impatient{Conn: c.Conn} }

// A proxy with users lets in nobody else, for hosts and tunnels alike; who named
// itself is known to the handler, for each connection, and by no header.
func TestProxyWithUsersLetsInNobodyElse(t *testing.T) {
	b := newBait(t)
	far := listenRaw(t, echo)
	asked := make(chan string, 1000)
	r := run(t, Options{Tunnel: []string{far, "127.0.0.1:" + b.port}, Login: func(user, password string) bool {
		asked <- user
		return user != "" && password == "of "+user
	}})
	for _, login := range []*url.Userinfo{nil, url.UserPassword("anna", "wrong"), url.UserPassword("anna", ""), url.UserPassword("", ""), url.UserPassword("", "of "), url.User("anna")} {
		for _, target := range []string{"https://ghcr.io/v2/", "https://127.0.0.1:" + b.port} {
			if resp, err := r.client(false, login).Get(target); err == nil || !strings.Contains(err.Error(), "Proxy Authentication Required") {
				t.Errorf("%s as %v = %v, %v; want 407", target, login, resp, err)
			}
		}
		if resp, err := r.client(false, login).Get("http://ghcr.io/"); err != nil || resp.StatusCode != http.StatusProxyAuthRequired {
			t.Errorf("plain http as %v = %v, %v; want 407", login, resp, err)
		}
	}
	for _, header := range []string{
		"", "Authorization: Basic YW5uYTpvZiBhbm5h\r\n", "Proxy-Authorization: Bearer YW5uYTpvZiBhbm5h\r\n", "Proxy-Authorization: Basic\r\n", "Proxy-Authorization: Basic %%%\r\n",
		"Proxy-Authorization: Basic YW5uYQ==\r\n", "Proxy-Authorization: anna:of anna\r\n",
	} {
		for _, target := range []string{"ghcr.io:443", "127.0.0.1:" + b.port, "evil.example:443"} {
			resp, _ := r.connect("CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\n" + header + "\r\n")
			if text := body(t, resp); resp.StatusCode != http.StatusProxyAuthRequired || !strings.HasPrefix(resp.Header.Get("Proxy-Authenticate"), "Basic ") || strings.Contains(text, "evil.example") {
				t.Errorf("CONNECT %s with %q = %d %v %s, want 407 with a challenge", target, header, resp.StatusCode, resp.Header, text)
			}
		}
	}
	if b.hits.Load() != 0 || len(r.got) != 0 {
		t.Error("somebody without a password was let through")
	}

	var wg sync.WaitGroup
	for _, user := range []string{"anna", "ben", "cleo:"} {
		for _, h2 := range []bool{false, true} {
			wg.Go(func() {
				name, _, _ := strings.Cut(user, ":")
				c := r.client(h2, url.UserPassword(name, "of "+name))
				for range 3 {
					resp, err := c.Get("https://ghcr.io/" + name)
					if err != nil {
						t.Error(err)
						return
					}
					resp.Body.Close()
				}
			})
		}
	}
	wg.Wait()
	if got := len(r.got); got != 3*2*3 {
		t.Errorf("%d requests of users arrived, want 18", got)
	}
	for len(r.got) > 0 {
		a := <-r.got
		if name := strings.TrimPrefix(a.path, "/"); !a.named || a.who != (Client{name, "of " + name}) {
			t.Errorf("the request of %s is told to be of %+v", name, a.who)
		}
		if strings.Contains(fmt.Sprint(a.header), "Proxy-") || a.header.Get("Authorization") != "" {
			t.Errorf("the handler is told %v", a.header)
		}
	}
	resp, c := r.connect("CONNECT " + far + " HTTP/1.1\r\nHost: " + far + "\r\nProxy-Authorization: Basic YW5uYTpvZiBhbm5h\r\n\r\n")
	fmt.Fprint(c, "hello")
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); resp.StatusCode != http.StatusOK || err != nil || string(got) != "hello" {
		t.Errorf("a tunnel of a user = %d, echoes %q, %v", resp.StatusCode, got, err)
	}
	if _, ok := ClientOf(context.Background()); ok {
		t.Error("a request that came some other way has a client of the proxy")
	}
}

// The proxy ends when it is told to, whatever its clients are at: the address is
// free, who waits is told, and no more connections are handed out.
func TestRunEndsCleanly(t *testing.T) {
	far := listenRaw(t, echo)
	r := run(t, Options{Tunnel: []string{far}})
	silent, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	half, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	fmt.Fprint(half, "CONNECT ghcr.io:443 HTTP/1.1\r\nHo")
	r.to(far)
	r.to("ghcr.io:443") // and nothing more
	_, busy, err := handshake(r.to("ghcr.io:443"), &tls.Config{RootCAs: r.roots, ServerName: "ghcr.io"})
	if err != nil {
		t.Fatal(err)
	}

	began := time.Now()
	if err := r.stop(); err != nil {
		t.Errorf("Run = %v, want nil", err)
	}
	if took := time.Since(began); took > patience/2 {
		t.Errorf("the end took %v", took)
	}
	if c, err := net.DialTimeout("tcp", r.addr, time.Second); err == nil {
		c.Close()
		t.Error("the address is still listened on")
	}
	for what, c := range map[string]net.Conn{"who asked nothing": silent, "who was asking": half, "who was connected": busy} {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s still waits", what)
		}
	}
	if c, err := r.Accept(); c != nil || !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept = %v, %v; want net.ErrClosed", c, err)
	}
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Errorf("Close = %v, want nil however often", err)
	}
}

// A connection that nobody takes over any more is closed, and does not wait for
// ever.
func TestConnectionThatNobodyAcceptsIsClosed(t *testing.T) {
	p := New(Options{Addr: "127.0.0.1:0", Hosts: hosts, CA: authority(t)})
	if err := p.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	r := &running{Proxy: p, t: t, addr: p.Address().String()}
	c := r.to("ghcr.io:443")
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the client reads %v, want the end", err)
	}
	cancel()
	if err := next(t, ended, "end of Run"); err != nil {
		t.Errorf("Run = %v, want nil", err)
	}
}

// What is listed can be written with and without a port, in any case, and as an
// address; a name is minted for once.
func TestHostsAreOnPort443UnlessTheySay(t *testing.T) {
	for in, want := range map[string]string{
		"ghcr.io": "ghcr.io:443", "GHCR.IO:8443": "ghcr.io:8443", "127.0.0.1": "127.0.0.1:443", "::1": "[::1]:443", "[::1]": "[::1]:443", "[::1]:5000": "[::1]:5000",
	} {
		if got := withPort(in); got != want {
			t.Errorf("%s is %s, want %s", in, got, want)
		}
	}
	if got, want := CertificateHosts([]string{"ghcr.io", "GHCR.io:8443", "[::1]:5000", "quay.io"}), []string{"ghcr.io", "::1", "quay.io"}; !slices.Equal(got, want) {
		t.Errorf("certificates are made for %q, want %q", got, want)
	}
}

// Whatever a client writes, it is connected to what is configured or to nothing:
// no connection is handed out for another host, and nobody else is dialled.
func FuzzConnect(f *testing.F) {
	far := listenRaw(f, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	b := newBait(f)
	p := New(Options{Addr: "127.0.0.1:0", Hosts: hosts, Tunnel: []string{far}, CA: authority(f)})
	if err := p.Listen(); err != nil {
		f.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = p.Run(ctx)
	}()
	f.Cleanup(func() {
		cancel()
		<-done
		p.Close()
	})
	handed := make(chan *conn, 100)
	go func() {
		for {
			c, err := p.Accept()
			if err != nil {
				return
			}
			handed <- c.(*conn)
			c.Close()
		}
	}()

	for _, seed := range []string{
		"CONNECT ghcr.io:443 HTTP/1.1\r\nHost: ghcr.io:443\r\n\r\n", "CONNECT GHCR.io:443 HTTP/1.1\r\nHost: quay.io\r\n\r\n", "CONNECT LISTED HTTP/1.1\r\nHost: LISTED\r\n\r\n",
		"CONNECT 127.0.0.1:BAIT HTTP/1.1\r\nHost: LISTED\r\n\r\n", "CONNECT localhost:BAIT HTTP/1.0\r\n\r\n", "CONNECT [::ffff:127.0.0.1]:BAIT HTTP/1.1\r\nHost: ghcr.io:443\r\n\r\n",
		"CONNECT LISTED@127.0.0.1:BAIT HTTP/1.1\r\nHost: LISTED\r\n\r\n", "CONNECT 127.0.0.1:BAIT@ghcr.io:443 HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT /127.0.0.1:BAIT HTTP/1.1\r\nHost: LISTED\r\n\r\n",
		"CONNECT //127.0.0.1:BAIT/LISTED HTTP/1.1\r\nHost: 127.0.0.1:BAIT\r\n\r\n", "CONNECT http://127.0.0.1:BAIT HTTP/1.1\r\nHost: LISTED\r\n\r\n",
		"GET http://127.0.0.1:BAIT/ HTTP/1.1\r\nHost: ghcr.io\r\n\r\nCONNECT LISTED HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT ghcr.io:443 HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbodyCONNECT 127.0.0.1:BAIT HTTP/1.1\r\n\r\n",
		"CONNECT 127.0.0.1:BAIT HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "CONNECT ghcr.io:443#@127.0.0.1:BAIT HTTP/1.1\r\nHost: x\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"CONNECT ghcr.io.:443 HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT \x00 HTTP/1.1\r\n\r\n", "CONNECT  HTTP/1.1\r\n\r\n", "", "\r\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, request string) {
		request = strings.NewReplacer("BAIT", b.port, "LISTED", far).Replace(request)
		raw, err := net.Dial("tcp", p.Address().String())
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		_ = raw.SetDeadline(time.Now().Add(patience))
		_ = raw.(*net.TCPConn).SetLinger(0) // thousands of these would use up all ports
		_, _ = io.WriteString(raw, request)
		_ = raw.(*net.TCPConn).CloseWrite()
		answer, err := io.ReadAll(raw)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%q is not answered", request)
		}
		if n := b.hits.Load(); n != 0 {
			t.Fatalf("%q leads to what is not configured", request)
		}
		asked := strings.ToLower(request)
		if bytes.Contains(answer, []byte("200 Connection established")) && !strings.Contains(asked, far) &&
			!slices.ContainsFunc(slices.Collect(maps.Keys(p.hosts)), func(target string) bool { return strings.Contains(asked, target) }) {
			t.Fatalf("%q is granted, and names nothing that is configured", request)
		}
		for len(handed) > 0 {
			if c := <-handed; p.hosts[c.target] == "" || p.hosts[c.target] != c.name {
				t.Fatalf("%q or one before: handed out is a connection to %q, for which %q is minted", request, c.target, c.name)
			}
		}
	})
}
