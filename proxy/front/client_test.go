package front_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"tidemark/proxy/front"
)

// A clientsCA signs certificates of clients.
type clientsCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newClientsCA(t *testing.T) *clientsCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "CA of clients"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &clientsCA{cert, key}
}

func (a *clientsCA) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// client is a certificate for a client, changed as the test wants it.
func (a *clientsCA) client(t *testing.T, name string, change ...func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, c := range change {
		c(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// A guarded is a server that answers only clients with certificates.
type guarded struct {
	*running
	t      *testing.T
	pair   pair
	caFile string
	log    chan string
	asked  atomic.Int32 // requests that reached the handler
}

// guard starts a server for clients of a, which tells them how they are called;
// change is what else its TLS has.
func guard(t *testing.T, a *clientsCA, change func(*tls.Config)) *guarded {
	t.Helper()
	g := &guarded{t: t, pair: newPair(t), caFile: filepath.Join(t.TempDir(), "clients.crt"), log: make(chan string, 1000)}
	g.pair.put(t, g.caFile, a.pem(), 1)
	cfg, err := front.Files(g.pair.cert, g.pair.key, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(cfg)
	}
	strict, err := front.RequireClients(cfg, g.caFile, zerolog.New(logTo(g.log)))
	if err != nil {
		t.Fatal(err)
	}
	g.running = run(t, front.Options{TLS: strict, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.asked.Add(1)
		fmt.Fprintf(w, "hello %s", front.ClientName(r))
	})})
	return g
}

// ask makes a connection of its own and a request on it. TLS 1.3 tells a client that
// it is refused only when it reads.
func (g *guarded) ask(cfg *tls.Config, cert *tls.Certificate) (answer string, state tls.ConnectionState, err error) {
	cfg = cfg.Clone()
	cfg.InsecureSkipVerify = true
	if cert != nil {
		cfg.Certificates = []tls.Certificate{*cert}
	}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", g.addr, cfg)
	if err != nil {
		return "", state, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprint(conn, "GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	all, err := io.ReadAll(conn)
	if head, body, ok := strings.Cut(string(all), "\r\n\r\n"); ok && strings.HasPrefix(head, "HTTP/1.1 200 ") {
		return body, conn.ConnectionState(), nil
	}
	if err == nil {
		err = fmt.Errorf("no answer but %q", all)
	}
	return "", conn.ConnectionState(), err
}

var versions = []uint16{tls.VersionTLS12, tls.VersionTLS13}

func only(version uint16) *tls.Config { return &tls.Config{MinVersion: version, MaxVersion: version} }

// Who presents a certificate of the authority is answered and known by its name; who
// presents none, or another's, or one that is not for a client now, is not answered
// anything.
func TestClientsNeedACertificateOfTheAuthority(t *testing.T) {
	a, other := newClientsCA(t), newClientsCA(t)
	g := guard(t, a, nil)
	self := newClientsCA(t)
	for _, version := range versions {
		for _, c := range []struct {
			name string
			cert *tls.Certificate
			want string // "" is refused
		}{
			{"none", nil, ""},
			{"the right one", a.client(t, "builder-7"), "hello builder-7"},
			{"the right one, without a name", a.client(t, ""), "hello "},
			{"another authority's", other.client(t, "builder-7"), ""},
			{"its own", &tls.Certificate{Certificate: [][]byte{self.cert.Raw}, PrivateKey: self.key}, ""},
			{"one that has run out", a.client(t, "old", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), ""},
			{"one that is for later", a.client(t, "new", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), ""},
			{"a server's", a.client(t, "server", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), ""},
		} {
			before := g.asked.Load()
			got, _, err := g.ask(only(version), c.cert)
			if got != c.want {
				t.Errorf("%s with %s is answered %q, %v; want %q", tls.VersionName(version), c.name, got, err, c.want)
			}
			if n := g.asked.Load() - before; n != 0 != (c.want != "") {
				t.Errorf("%s with %s: %d requests reached the handler", tls.VersionName(version), c.name, n)
			}
		}
	}
	if got := front.ClientName(&http.Request{}); got != "" {
		t.Errorf("a client without TLS is called %q", got)
	}
	if got := front.ClientName(&http.Request{TLS: &tls.ConnectionState{}}); got != "" {
		t.Errorf("a client without a certificate is called %q", got)
	}
}

// HTTP/2 is as guarded as HTTP/1.1.
func TestClientsNeedACertificateInHTTP2(t *testing.T) {
	a := newClientsCA(t)
	g := guard(t, a, nil)
	for _, cert := range []*tls.Certificate{nil, a.client(t, "builder-7")} {
		cfg := &tls.Config{InsecureSkipVerify: true}
		if cert != nil {
			cfg.Certificates = []tls.Certificate{*cert}
		}
		tr := &http.Transport{TLSClientConfig: cfg, ForceAttemptHTTP2: true}
		resp, err := (&http.Client{Transport: tr, Timeout: patience}).Get("https://" + g.addr)
		if cert == nil {
			if err == nil {
				t.Errorf("without a certificate it is %d", resp.StatusCode)
			}
			continue
		}
		if err != nil || resp.ProtoMajor != 2 {
			t.Fatalf("with a certificate it is %v, %v; want an answer in HTTP/2", resp, err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		tr.CloseIdleConnections()
		if string(body) != "hello builder-7" {
			t.Errorf("it is answered %q", body)
		}
	}
}

// What is older than TLS 1.2 is refused, a certificate or not.
func TestClientsNeedNewTLS(t *testing.T) {
	a := newClientsCA(t)
	g := guard(t, a, nil)
	cert := a.client(t, "builder-7")
	for version, ok := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		if got, _, err := g.ask(only(version), cert); (err == nil) != ok {
			t.Errorf("%s is answered %q, %v; want success %t", tls.VersionName(version), got, err, ok)
		}
	}
}

// All authorities in the file count.
func TestFileOfSeveralAuthorities(t *testing.T) {
	a, b := newClientsCA(t), newClientsCA(t)
	g := guard(t, a, nil)
	g.pair.put(t, g.caFile, append(a.pem(), b.pem()...), 2)
	eventually(t, "both authorities count", func() bool {
		_, _, err := g.ask(&tls.Config{}, b.client(t, "b"))
		return err == nil
	})
	if _, _, err := g.ask(&tls.Config{}, a.client(t, "a")); err != nil {
		t.Error(err)
	}
}

// When the authority in the file is another, its clients are let in and those of the
// old one are not, though they have sessions from before to take up again.
func TestChangeOfTheAuthorityEndsOldSessions(t *testing.T) {
	t.Parallel()
	old, anew := newClientsCA(t), newClientsCA(t)
	g := guard(t, old, nil)
	oldCert, newCert := old.client(t, "old"), anew.client(t, "new")
	cfgs := make(map[uint16]*tls.Config)
	for _, version := range versions {
		cfg := only(version)
		cfg.ClientSessionCache = tls.NewLRUClientSessionCache(8)
		cfgs[version] = cfg
		resumed := false
		for range 3 {
			got, state, err := g.ask(cfg, oldCert)
			if got != "hello old" {
				t.Fatalf("%s: %q, %v", tls.VersionName(version), got, err)
			}
			resumed = state.DidResume
		}
		if !resumed {
			t.Logf("%s: sessions are not taken up again at all", tls.VersionName(version))
		}
		if _, _, err := g.ask(only(version), newCert); err == nil {
			t.Fatal("the new authority's client is let in already")
		}
	}

	g.pair.put(t, g.caFile, anew.pem(), 2)
	eventually(t, "the new authority counts", func() bool {
		_, _, err := g.ask(&tls.Config{}, newCert)
		return err == nil
	})
	for _, version := range versions {
		for range 3 {
			if got, state, err := g.ask(cfgs[version], oldCert); err == nil {
				t.Errorf("%s: a client of the old authority is answered %q, resumed %t", tls.VersionName(version), got, state.DidResume)
			}
			if got, state, err := g.ask(cfgs[version], nil); err == nil {
				t.Errorf("%s: a client without its certificate is answered %q, resumed %t", tls.VersionName(version), got, state.DidResume)
			}
		}
		if got, _, err := g.ask(only(version), newCert); got != "hello new" {
			t.Errorf("%s: a client of the new authority is answered %q, %v", tls.VersionName(version), got, err)
		}
	}
	if len(g.log) != 0 {
		t.Errorf("log = %s, want nothing", <-g.log)
	}
}

// While the file is broken, or gone, the authority of before counts, and that is
// told.
func TestBrokenFileOfTheAuthorityLeavesTheOldOne(t *testing.T) {
	t.Parallel()
	a := newClientsCA(t)
	g := guard(t, a, nil)
	cert := a.client(t, "a")
	for name, spoil := range map[string]func(){
		"broken": func() { g.pair.put(t, g.caFile, []byte("half a certif"), 2) },
		"empty":  func() { g.pair.put(t, g.caFile, nil, 3) },
		"gone": func() {
			if err := os.Remove(g.caFile); err != nil {
				t.Fatal(err)
			}
		},
	} {
		spoil()
		for len(g.log) > 0 {
			<-g.log
		}
		eventually(t, "a warning that the file is "+name, func() bool {
			if got, _, err := g.ask(&tls.Config{}, cert); err != nil {
				t.Fatalf("while the file is %s a client is answered %q, %v", name, got, err)
			}
			if _, _, err := g.ask(&tls.Config{}, nil); err == nil {
				t.Fatalf("while the file is %s, who has no certificate is answered", name)
			}
			return len(g.log) > 0
		})
		if got := <-g.log; !strings.Contains(got, `"warn"`) || !strings.Contains(got, g.caFile) {
			t.Errorf("log = %s, want a warning that names %s", got, g.caFile)
		}
		g.pair.put(t, g.caFile, a.pem(), 1)
	}
}

// A file that holds no authority at the start is an error that names it: a server
// that could not tell its clients must not start.
func TestAuthorityMustBeGoodAtTheStart(t *testing.T) {
	p := newPair(t)
	cfg, err := front.Files(p.cert, p.key, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "broken")
	p.put(t, broken, []byte("no PEM"), 1)
	for _, file := range []string{broken, broken + ".absent", p.key} {
		if strict, err := front.RequireClients(cfg, file, zerolog.Nop()); err == nil || strict != nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: error = %v, want one that names it", file, err)
		}
	}
	if cfg.ClientAuth != tls.NoClientCert || cfg.GetConfigForClient != nil {
		t.Error("the configuration that was given is changed")
	}
}

// An ACME server checks a name without a certificate of a client. Who pretends to be
// one gets past the handshake at most, and never an answer, nor a session that would
// do for one.
func TestACMEServersAreNotAnswered(t *testing.T) {
	const acme = "acme-tls/1"
	for name, change := range map[string]func(*tls.Config){
		"with files": nil,
		"with ACME":  func(c *tls.Config) { c.NextProtos = append(c.NextProtos, acme) },
	} {
		t.Run(name, func(t *testing.T) {
			a := newClientsCA(t)
			g := guard(t, a, change)
			for _, version := range versions {
				sessions := tls.NewLRUClientSessionCache(8)
				for _, protos := range [][]string{{acme}, {acme, "http/1.1"}, {"http/1.1", acme}, {acme, "h2"}, {acme, acme}, {"ACME-TLS/1"}, {"h2"}, {"http/1.1"}, nil} {
					for _, speak := range []string{"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"} {
						cfg := only(version)
						cfg.NextProtos, cfg.InsecureSkipVerify, cfg.ClientSessionCache = protos, true, sessions
						conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", g.addr, cfg)
						if err != nil {
							continue
						}
						_ = conn.SetDeadline(time.Now().Add(patience))
						_, _ = io.WriteString(conn, speak)
						got, err := io.ReadAll(conn)
						state := conn.ConnectionState()
						conn.Close()
						if len(got) != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
							t.Errorf("%s: who offers %q and speaks %.10q is answered %q, %v in %q, resumed %t", tls.VersionName(version), protos, speak, got, err, state.NegotiatedProtocol, state.DidResume)
						}
					}
				}
			}
			if n := g.asked.Load(); n != 0 {
				t.Errorf("%d requests reached the handler", n)
			}
			if got, _, err := g.ask(&tls.Config{}, a.client(t, "a")); got != "hello a" {
				t.Errorf("a client is answered %q, %v", got, err)
			}
		})
	}
}
