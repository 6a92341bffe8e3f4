package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/proxy/ca"
)

// A pebble is an ACME server that finds every name on this machine.
type pebble struct {
	addr, management string
	caFile           string       // of the certificate of the server itself
	client           *http.Client // that trusts it
	httpAddr         string       // where it checks HTTP-01
	tlsAddr          string       // where it checks TLS-ALPN-01
	stop             func()
}

// startPebble starts an ACME server whose certificates are valid for a while.
func startPebble(t *testing.T, valid time.Duration) *pebble {
	t.Helper()
	program, dns := need(t, "pebble"), need(t, "pebble-challtestsrv")
	p := &pebble{addr: freeAddr(t), management: freeAddr(t), httpAddr: freeAddr(t), tlsAddr: freeAddr(t)}
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	authority, err := ca.Open(dir, "pebble")
	if err != nil {
		t.Fatal(err)
	}
	p.caFile = authority.Path()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := authority.Sign(&x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}, key.Public(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	conf, err := json.Marshal(map[string]any{"pebble": map[string]any{
		"listenAddress": p.addr, "managementListenAddress": p.management, "certificate": certFile, "privateKey": keyFile,
		"httpPort": port(p.httpAddr), "tlsPort": port(p.tlsAddr),
		"profiles": map[string]any{"default": map[string]any{"description": "the only one", "validityPeriod": int(valid.Seconds())}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	confFile := filepath.Join(dir, "pebble.json")
	for name, data := range map[string][]byte{certFile: cert, keyFile: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), confFile: conf} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(authority.PEM())
	p.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	dnsAddr, dnsManagement := freeAddr(t), freeAddr(t)
	process(t, func() bool { return listens(dnsManagement) }, dns, "-dnsserver", dnsAddr, "-management", dnsManagement,
		"-defaultIPv4", "127.0.0.1", "-defaultIPv6", "", "-http01", "", "-https01", "", "-tlsalpn01", "", "-doh", "")
	p.stop = processWith(t, []string{"PEBBLE_VA_NOSLEEP=1"}, func() bool { return listens(p.addr) }, program, "-config", confFile, "-dnsserver", dnsAddr)
	return p
}

func port(addr string) int {
	_, p, err := net.SplitHostPort(addr)
	if err != nil {
		panic(err)
	}
	n, err := net.LookupPort("tcp", p)
	if err != nil {
		panic(err)
	}
	return n
}

func listens(addr string) bool {
	c, err := net.Dial("tcp", addr)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// root is the certificate to trust whoever has one of its certificates.
func (p *pebble) root(t *testing.T) *x509.CertPool {
	t.Helper()
	resp, err := p.client.Get("https://" + p.management + "/roots/0")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	pool := x509.NewCertPool()
	if err != nil || !pool.AppendCertsFromPEM(data) {
		t.Fatalf("pebble's root is %s, %v", data, err)
	}
	return pool
}

// serve starts tidemark with certificates of p, on a folder.
func (p *pebble) serve(t *testing.T, data, httpAddr, tlsAddr string) *server {
	t.Helper()
	return serve(t, fmt.Sprintf(`data: %s
registry:
  listen: "%s"
  tls: {mode: acme, hosts: [mirror.test], email: ops@mirror.test, acme_directory: "https://%s/dir", acme_ca_file: %s, acme_http: "%s"}
admin: {listen: "127.0.0.1:0"}
`, data, tlsAddr, p.addr, p.caFile, httpAddr))
}

// presented waits for a certificate that roots trust, and returns it.
func presented(t *testing.T, addr string, roots *x509.CertPool, other *x509.Certificate) *x509.Certificate {
	t.Helper()
	var last error
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		c, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: roots, ServerName: "mirror.test", NextProtos: []string{"h2"}})
		if err != nil {
			last = err
			continue
		}
		st := c.ConnectionState()
		c.Close()
		if st.NegotiatedProtocol != "h2" || st.Version < tls.VersionTLS12 {
			t.Fatalf("spoken is %q, version %x; want h2 over TLS 1.2 or newer", st.NegotiatedProtocol, st.Version)
		}
		if other == nil || st.PeerCertificates[0].SerialNumber.Cmp(other.SerialNumber) != 0 {
			return st.PeerCertificates[0]
		}
		last = fmt.Errorf("it is still the certificate with the serial number %x", other.SerialNumber)
	}
	t.Fatalf("no certificate after 60 s: %v", last)
	return nil
}

// A real ACME server checks the name in either way, and gives a certificate, which
// is kept: the next start presents it with the ACME server gone.
func TestCertificatesFromAnACMEServer(t *testing.T) {
	for _, challenge := range []string{"http-01", "tls-alpn-01"} {
		t.Run(challenge, func(t *testing.T) {
			p := startPebble(t, 90*24*time.Hour)
			httpAddr, tlsAddr := p.httpAddr, p.tlsAddr
			if challenge == "http-01" {
				tlsAddr = freeAddr(t) // where the other way leads nowhere
			} else {
				httpAddr = freeAddr(t)
			}
			data := filepath.Join(t.TempDir(), "data")
			s := p.serve(t, data, httpAddr, tlsAddr)
			roots := p.root(t)
			cert := presented(t, tlsAddr, roots, nil)
			var ready struct{ Warnings []string }
			s.getJSON("/readyz", &ready)
			for _, w := range ready.Warnings {
				if strings.Contains(w, "certificate") {
					t.Errorf("with a certificate it warns: %s", w)
				}
			}
			s.stop()
			p.stop()
			s = p.serve(t, data, httpAddr, tlsAddr)
			if again := presented(t, tlsAddr, roots, nil); again.SerialNumber.Cmp(cert.SerialNumber) != 0 {
				t.Error("the certificate was not kept")
			}
			s.stop()
		})
	}
}

// A certificate that is about to end is replaced by another.
func TestCertificateIsRenewed(t *testing.T) {
	p := startPebble(t, 12*time.Second)
	data := filepath.Join(t.TempDir(), "data")
	s := p.serve(t, data, p.httpAddr, p.tlsAddr)
	first := presented(t, p.tlsAddr, p.root(t), nil)
	s.stop()
	time.Sleep(time.Until(first.NotBefore.Add(9 * time.Second))) // its last third
	s = p.serve(t, data, p.httpAddr, p.tlsAddr)
	presented(t, p.tlsAddr, p.root(t), first)
	s.stop()
}

// Without an ACME server tidemark starts, says what it misses, and hangs up on
// clients of TLS instead of answering them in the clear.
func TestStartWithoutAnACMEServer(t *testing.T) {
	p := &pebble{addr: freeAddr(t)}
	authority, err := ca.Open(t.TempDir(), "nobody")
	if err != nil {
		t.Fatal(err)
	}
	p.caFile = authority.Path()
	addr := freeAddr(t)
	s := p.serve(t, filepath.Join(t.TempDir(), "data"), freeAddr(t), addr)
	var ready struct {
		Ready    bool
		Warnings []string
	}
	s.getJSON("/readyz", &ready)
	if !ready.Ready || len(ready.Warnings) != 1 || !strings.Contains(ready.Warnings[0], "no certificate for mirror.test") {
		t.Errorf("/readyz = %+v, want a warning about the certificate", ready)
	}
	if c, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, ServerName: "mirror.test"}); err == nil {
		c.Close()
		t.Error("a handshake succeeded without a certificate")
	}
	s.stop()
}
