package front_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"tidemark/proxy/front"
)

// A pair is the files of a certificate and its key.
type pair struct{ cert, key string }

// write puts a new self-signed certificate for 127.0.0.1 into the files.
func (p pair) write(t *testing.T, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		Subject:      pkix.Name{CommonName: "front_test"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{p.cert: {Type: "CERTIFICATE", Bytes: der}, p.key: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		p.put(t, name, pem.EncodeToMemory(block), serial)
	}
}

// put replaces a file; its time is told by serial and not by the clock, so that
// two writes never look like one.
func (p pair) put(t *testing.T, name string, content []byte, serial int64) {
	t.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	at := time.Unix(1_700_000_000+serial, 0)
	if err := os.Chtimes(name, at, at); err != nil {
		t.Fatal(err)
	}
}

func newPair(t *testing.T) pair {
	dir := t.TempDir()
	p := pair{filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")}
	p.write(t, 1)
	return p
}

// runFiles starts a server with p's certificate.
func runFiles(t *testing.T, p pair, h http.Handler) (*running, chan string) {
	t.Helper()
	log := make(chan string, 1000)
	cfg, err := front.Files(p.cert, p.key, zerolog.New(logTo(log)))
	if err != nil {
		t.Fatal(err)
	}
	return run(t, front.Options{Handler: h, TLS: cfg}), log
}

// handshake makes a connection and returns what it was told.
func handshake(addr string, cfg *tls.Config) (tls.ConnectionState, error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", addr, cfg)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer conn.Close()
	return conn.ConnectionState(), nil
}

// serial is the number of the certificate that a server presents now.
func serial(t *testing.T, addr string) int64 {
	t.Helper()
	state, err := handshake(addr, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	return state.PeerCertificates[0].SerialNumber.Int64()
}

// eventually polls until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for began := time.Now(); !cond(); time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// A certificate that is renewed on disk is presented soon after, without a
// restart; one that cannot be read leaves the old one in use, and is told.
func TestCertificateFollowsItsFiles(t *testing.T) {
	t.Parallel()
	p := newPair(t)
	s, log := runFiles(t, p, http.NotFoundHandler())
	if got := serial(t, s.addr); got != 1 {
		t.Fatalf("certificate %d, want 1", got)
	}

	p.put(t, p.cert, []byte("half a certif"), 2)
	eventually(t, "a warning about the broken certificate", func() bool {
		if got := serial(t, s.addr); got != 1 {
			t.Fatalf("certificate %d while the new one is broken, want 1", got)
		}
		return len(log) > 0
	})
	if got := <-log; !strings.Contains(got, `"warn"`) || !strings.Contains(got, p.cert) || !strings.Contains(got, "the old one is used") {
		t.Errorf("log = %s, want a warning that names %s", got, p.cert)
	}

	p.write(t, 3)
	eventually(t, "the new certificate is presented", func() bool { return serial(t, s.addr) == 3 })
}

// A certificate that vanishes, as it does for a moment when it is replaced,
// leaves the old one in use.
func TestVanishedCertificateIsStillUsed(t *testing.T) {
	t.Parallel()
	p := newPair(t)
	s, log := runFiles(t, p, http.NotFoundHandler())
	if err := errors.Join(os.Remove(p.cert), os.Remove(p.key)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a warning about the missing certificate", func() bool {
		if got := serial(t, s.addr); got != 1 {
			t.Fatalf("certificate %d while the files are gone, want 1", got)
		}
		return len(log) > 0
	})
}

// Files that hold no certificate at the start are an error that names them: a
// server that cannot show one must not start.
func TestFilesMustBeGoodAtTheStart(t *testing.T) {
	p, other := newPair(t), newPair(t)
	broken := filepath.Join(t.TempDir(), "broken")
	p.put(t, broken, []byte("no PEM"), 1)
	for _, c := range []struct{ name, cert, key, says string }{
		{"no file", broken + ".crt", p.key, broken + ".crt"},
		{"no PEM", broken, p.key, broken},
		{"another's key", p.cert, other.key, other.key},
	} {
		if cfg, err := front.Files(c.cert, c.key, zerolog.Nop()); err == nil || cfg != nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error = %v, want one that names %s", c.name, err, c.says)
		}
	}
}

// What is older than TLS 1.2 is refused; 1.2 and 1.3 are not.
func TestOldTLSIsRefused(t *testing.T) {
	s, _ := runFiles(t, newPair(t), http.NotFoundHandler())
	for version, ok := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		state, err := handshake(s.addr, &tls.Config{InsecureSkipVerify: true, MinVersion: version, MaxVersion: version})
		if got := err == nil && state.Version == version; got != ok {
			t.Errorf("%s is taken: %v (%v), want %v", tls.VersionName(version), got, err, ok)
		}
	}
}

// Clients that can speak HTTP/2 are answered in it, and others in HTTP/1.1.
func TestHTTP2IsNegotiated(t *testing.T) {
	s, _ := runFiles(t, newPair(t), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Proto) }))
	for _, c := range []struct {
		force bool
		want  string
	}{{true, "HTTP/2.0"}, {false, "HTTP/1.1"}} {
		tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: c.force}
		t.Cleanup(tr.CloseIdleConnections)
		status, body := get(t, &http.Client{Transport: tr}, "https://"+s.addr)
		if status != 200 || string(body) != c.want {
			t.Errorf("answered %d in %s, want 200 in %s", status, body, c.want)
		}
		if l := next(t, s.lines, "access line"); l.Status != 200 || l.Bytes != int64(len(c.want)) {
			t.Errorf("line = %+v, want 200 with %d bytes", l, len(c.want))
		}
	}
}

// Scanners and clients without our CA fail their handshakes all day. That is
// theirs to mend and is logged at debug only.
func TestFailedHandshakeIsLoggedAtDebugOnly(t *testing.T) {
	s, _ := runFiles(t, newPair(t), http.NotFoundHandler())
	for _, fail := range []func(){
		func() { _, _ = handshake(s.addr, &tls.Config{}) }, // does not trust the certificate
		func() { _, _ = handshake(s.addr, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS11}) },
		func() {
			conn, err := net.Dial("tcp", s.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprint(conn, "\x00\x01\x02 no hello at all")
		},
	} {
		fail()
		if got := next(t, s.log, "log line"); !strings.Contains(got, `"level":"debug"`) || !strings.Contains(got, "TLS handshake error") {
			t.Errorf("log = %s, want the failed handshake at debug", got)
		}
	}
	if len(s.lines) != 0 {
		t.Error("a failed handshake has an access line")
	}
}

// startInternal starts a server with certificates of the CA in dir.
func startInternal(t *testing.T, dir string) (addr string, ca []byte) {
	t.Helper()
	i, err := front.NewInternal(dir, []string{"localhost", "127.0.0.1"}, zerolog.New(zerolog.NewTestWriter(t)))
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := i.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(i.Stop)
	ca, err = os.ReadFile(i.CA().Path())
	if err != nil {
		t.Fatal(err)
	}
	return run(t, front.Options{Handler: http.NotFoundHandler(), TLS: cfg}).addr, ca
}

// verified is the certificate for a name, checked against ca.
func verified(t *testing.T, addr, name string, ca []byte) *x509.Certificate {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		t.Fatal("the CA file holds no certificate")
	}
	state, err := handshake(addr, &tls.Config{RootCAs: roots, ServerName: name})
	if err != nil {
		t.Fatalf("certificate for %s: %v", name, err)
	}
	return state.PeerCertificates[0]
}

// The internal CA has a certificate for every host, by name and by address,
// that verifies against the one file clients are given, and against no other;
// its keys are for the server's eyes.
func TestInternalCAIsTrustedByItsFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	addr, ca := startInternal(t, dir)
	for _, name := range []string{"localhost", "127.0.0.1"} {
		cert := verified(t, addr, name, ca)
		if got := time.Until(cert.NotAfter); got > 31*24*time.Hour || cert.IsCA {
			t.Errorf("certificate for %s is valid for %v, CA %v; want a month, no CA", name, got, cert.IsCA)
		}
		_, err := handshake(addr, &tls.Config{ServerName: name})
		var unknown x509.UnknownAuthorityError
		if !errors.As(err, &unknown) {
			t.Errorf("%s without the CA file: %v, want an unknown authority", name, err)
		}
	}

	keys := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".key" {
			return err
		}
		keys++
		info, err := d.Info()
		if err == nil && info.Mode().Perm() != 0o600 {
			t.Errorf("mode of %s is %v, want -rw-------", path, info.Mode())
		}
		return err
	})
	if err != nil || keys != 3 {
		t.Errorf("%d keys, %v; want those of the CA and two hosts", keys, err)
	}
}

// A restart changes nothing for clients: same CA, same certificates.
func TestInternalCAOutlivesARestart(t *testing.T) {
	dir := t.TempDir()
	first, ca := startInternal(t, dir)
	second, again := startInternal(t, dir)
	if string(ca) != string(again) {
		t.Error("the second start made another CA")
	}
	for _, name := range []string{"localhost", "127.0.0.1"} {
		a, b := verified(t, first, name, ca), verified(t, second, name, ca)
		if a.SerialNumber.Cmp(b.SerialNumber) != 0 {
			t.Errorf("certificate for %s is %v after a restart, want %v", name, b.SerialNumber, a.SerialNumber)
		}
	}
}

// A CA without its key is an error and not a new CA, which no client would
// trust.
func TestInternalCAWithoutItsKeyIsNotReplaced(t *testing.T) {
	dir := t.TempDir()
	i, err := front.NewInternal(dir, []string{"localhost"}, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(i.CA().Path())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "internal-ca.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := front.NewInternal(dir, []string{"localhost"}, zerolog.Nop()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error = %v, want the missing key", err)
	}
	if after, err := os.ReadFile(i.CA().Path()); err != nil || string(after) != string(before) {
		t.Errorf("the CA's certificate changed (%v)", err)
	}
}
