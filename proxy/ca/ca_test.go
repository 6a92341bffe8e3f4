package ca_test

import (
	"bytes"
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
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/proxy/ca"
)

func open(t *testing.T, dir string, hosts ...string) *ca.Authority {
	t.Helper()
	a, err := ca.Open(dir, "test", hosts...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// contents are the files of a folder, with their modes.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		all[d.Name()] = info.Mode().String() + " " + string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func parse(t *testing.T, chain []byte) (certs []*x509.Certificate) {
	t.Helper()
	for block, rest := pem.Decode(chain); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, c)
	}
	return certs
}

// names are a certificate for hosts, which may be addresses.
func names(hosts ...string) *x509.Certificate {
	tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: hosts[0]}}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, h)
		}
	}
	return tmpl
}

// trusted tells whether a client that trusts a would take what a signs for hosts,
// when it wants to talk to one of them.
func trusted(t *testing.T, a *ca.Authority, want string, hosts ...string) error {
	t.Helper()
	chain, err := a.Sign(names(hosts...), newKey(t).Public(), time.Hour)
	if err != nil {
		t.Fatalf("sign for %q: %v", hosts, err)
	}
	return verify(t, a, parse(t, chain)[0], want)
}

func verify(t *testing.T, a *ca.Authority, leaf *x509.Certificate, want string) error {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(a.PEM()) {
		t.Fatal("the authority has no PEM")
	}
	if strings.Contains(want, ":") {
		want = "[" + want + "]"
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: want})
	return err
}

// An authority is made once, with a key that nobody else may read, and is the same
// whenever it is opened again.
func TestAuthorityIsMadeOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "not", "there")
	first := open(t, dir, "ghcr.io")
	before := contents(t, dir)
	if len(before) != 2 || !strings.HasPrefix(before["test-ca.key"], "-rw------- ") || !strings.HasPrefix(before["test-ca.crt"], "-rw-r--r-- ") {
		t.Errorf("the folder holds %.20q, want a key of mode 0600 and a certificate of mode 0644", before)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder is %v, %v; want mode 0700", info.Mode(), err)
	}
	for range 3 {
		again := open(t, dir, "ghcr.io")
		if again.Serial() != first.Serial() || !bytes.Equal(again.PEM(), first.PEM()) || again.Path() != filepath.Join(dir, "test-ca.crt") {
			t.Errorf("opened again it is %s in %s, want %s", again.Serial(), again.Path(), first.Serial())
		}
	}
	if after := contents(t, dir); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Error("opening it again changed its files")
	}
	if data, err := os.ReadFile(first.Path()); err != nil || !bytes.Equal(data, first.PEM()) {
		t.Errorf("its PEM is not its file, %v", err)
	}
	cert := parse(t, first.PEM())[0]
	if !cert.IsCA || time.Until(cert.NotAfter) < 9*365*24*time.Hour || cert.NotBefore.After(time.Now()) {
		t.Errorf("it is a CA: %t, from %v until %v; want years from now on", cert.IsCA, cert.NotBefore, cert.NotAfter)
	}
}

// Authorities of other names in the same folder have nothing to do with each other.
func TestAuthoritiesAreApart(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	b, err := ca.Open(dir, "other")
	if err != nil {
		t.Fatal(err)
	}
	if a.Serial() == b.Serial() {
		t.Error("two authorities have one number")
	}
	chain, err := b.Sign(names("ghcr.io"), newKey(t).Public(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(t, a, parse(t, chain)[0], "ghcr.io"); err == nil {
		t.Error("what one signs is taken for the other's")
	}
	if again := open(t, dir); again.Serial() != a.Serial() {
		t.Error("the other one replaced it")
	}
}

// What a crash has left beside it does not make its key readable.
func TestKeyIsSecretWhateverWasThere(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"test-ca.key.tmp", "test-ca.crt.tmp"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("half a key"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	open(t, dir)
	if got := contents(t, dir)["test-ca.key"]; !strings.HasPrefix(got, "-rw------- ") {
		t.Errorf("the key has mode %.10s, want -rw-------", got)
	}
}

// What is there is never replaced, however broken it is: clients trust it. Whoever
// starts the server is told which file it is and what to do.
func TestBrokenAuthorityIsNotReplaced(t *testing.T) {
	other := t.TempDir()
	open(t, other)
	foreign := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join(other, name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	key := newKey(t)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"ghcr.io"}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	server := map[string][]byte{
		"test-ca.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		"test-ca.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
	}
	for _, c := range []struct {
		name string
		put  map[string][]byte // nil removes
	}{
		{"key is missing", map[string][]byte{"test-ca.key": nil}},
		{"key is empty", map[string][]byte{"test-ca.key": {}}},
		{"key is something else", map[string][]byte{"test-ca.key": []byte("hello")}},
		{"key is another's", map[string][]byte{"test-ca.key": foreign("test-ca.key")}},
		{"certificate is empty", map[string][]byte{"test-ca.crt": {}}},
		{"certificate is something else", map[string][]byte{"test-ca.crt": []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")}},
		{"certificate is another's", map[string][]byte{"test-ca.crt": foreign("test-ca.crt")}},
		{"certificate is of a server", server},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			open(t, dir, "ghcr.io")
			for name, data := range c.put {
				path := filepath.Join(dir, name)
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				if data == nil {
					continue
				}
				if err := os.WriteFile(path, data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			before := contents(t, dir)
			for range 2 {
				a, err := ca.Open(dir, "test", "ghcr.io")
				if err == nil || a != nil {
					t.Fatalf("it is opened as %s", a.Serial())
				}
				if !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "test") || !strings.Contains(err.Error(), "remove") {
					t.Errorf("error = %v; want one that names %s and says what can be done", err, dir)
				}
				if strings.Contains(err.Error(), "PRIVATE") || strings.Contains(err.Error(), "hello") {
					t.Errorf("error = %v shows what is in the files", err)
				}
			}
			if after := contents(t, dir); fmt.Sprint(after) != fmt.Sprint(before) {
				t.Errorf("the files were changed from %.40q to %.40q", before, after)
			}
		})
	}
}

// Who removes the certificate, as the error says, has another authority made.
func TestAuthorityIsMadeAnewWithoutItsCertificate(t *testing.T) {
	dir := t.TempDir()
	a := open(t, dir)
	for _, name := range []string{"test-ca.key", "test-ca.crt"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if b := open(t, dir); b.Serial() == a.Serial() {
		t.Error("it is the same as before")
	}
}

// An authority that is made for hosts is of no use for others: what its key signs
// for them is refused by whoever trusts it, though it was stolen.
func TestAuthorityIsForItsHostsOnly(t *testing.T) {
	named := []string{"ghcr.io", "hub.example"}
	addressed := []string{"10.1.2.3", "2001:db8::1"}
	both := append(append([]string{}, named...), addressed...)
	for _, c := range []struct {
		made  []string
		want  string   // whom the client wants to talk to
		hosts []string // of the certificate; nil is want
		ok    bool
	}{
		{named, "ghcr.io", nil, true}, {named, "hub.example", nil, true}, {named, "GHCR.io", []string{"ghcr.io"}, true},
		{named, "pkg.ghcr.io", nil, true}, {named, "a.ghcr.io", []string{"*.ghcr.io"}, true}, {named, "ghcr.io", []string{"ghcr.io", "hub.example"}, true},
		{named, "quay.io", nil, false}, {named, "other.example", nil, false}, {named, "example", nil, false}, {named, "io", nil, false}, {named, "localhost", nil, false},
		{named, "xghcr.io", nil, false}, {named, "ghcr.io.evil.example", nil, false}, {named, "evil.io", nil, false}, {named, "evil.io", []string{"*.io"}, false},
		{named, "evil.example", []string{"ghcr.io", "evil.example"}, false}, {named, "ghcr.io", []string{"ghcr.io", "evil.example"}, false}, {named, "evil.example", []string{"evil.example", "ghcr.io"}, false},
		{named, "127.0.0.1", nil, false}, {named, "10.1.2.3", nil, false}, {named, "::1", nil, false}, {named, "::ffff:10.1.2.3", nil, false}, {named, "ghcr.io", []string{"ghcr.io", "10.1.2.3"}, false}, {named, "0.0.0.0", nil, false},

		{addressed, "10.1.2.3", nil, true}, {addressed, "2001:db8::1", nil, true}, {addressed, "10.1.2.3", addressed, true}, {addressed, "::ffff:10.1.2.3", nil, true},
		{addressed, "10.1.2.4", nil, false}, {addressed, "127.0.0.1", nil, false}, {addressed, "2001:db8::2", nil, false}, {addressed, "::1", nil, false},
		{addressed, "ghcr.io", nil, false}, {addressed, "localhost", nil, false}, {addressed, "10.1.2.3", []string{"10.1.2.3", "ghcr.io"}, false},

		{both, "ghcr.io", nil, true}, {both, "10.1.2.3", nil, true}, {both, "ghcr.io", both, true},
		{both, "quay.io", nil, false}, {both, "10.1.2.4", nil, false}, {both, "::1", nil, false},

		{nil, "ghcr.io", nil, true}, {nil, "anything.example", nil, true}, {nil, "127.0.0.1", nil, true}, {nil, "::1", nil, true},
	} {
		dir := t.TempDir()
		open(t, dir, c.made...)
		a := open(t, dir, c.made...) // as it is after a start
		hosts := c.hosts
		if hosts == nil {
			hosts = []string{c.want}
		}
		err := trusted(t, a, c.want, hosts...)
		if (err == nil) != c.ok {
			t.Errorf("made for %q, what it signs for %q is trusted for %s: %v, want %t", c.made, hosts, c.want, err, c.ok)
		}
		var invalid x509.CertificateInvalidError
		if !c.ok && (!errors.As(err, &invalid) || invalid.Reason != x509.CANotAuthorizedForThisName) {
			t.Errorf("made for %q, what it signs for %q is refused for %v, want for its name", c.made, hosts, err)
		}
	}
	cert := parse(t, open(t, t.TempDir(), named...).PEM())[0]
	if !cert.PermittedDNSDomainsCritical {
		t.Error("a client that does not understand the limits may ignore them, want them critical")
	}
}

// Nobody gets an authority of their own from it: what is below what it signs is not
// trusted.
func TestAuthorityHasNoOthersBelowIt(t *testing.T) {
	a := open(t, t.TempDir())
	key := newKey(t)
	chain, err := a.Sign(&x509.Certificate{Subject: pkix.Name{CommonName: "sub"}, IsCA: true, BasicConstraintsValid: true, DNSNames: []string{"sub"}}, key.Public(), time.Hour)
	if err != nil {
		return // even better
	}
	sub := parse(t, chain)[0]
	tmpl := names("ghcr.io")
	tmpl.SerialNumber, tmpl.NotAfter = big.NewInt(2), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, sub, newKey(t).Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM(a.PEM())
	between.AddCert(sub)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, DNSName: "ghcr.io"}); err == nil {
		t.Error("what a certificate below it signs is trusted")
	}
}

// What it signs is a certificate for a server, with the chain to show, numbered
// anew each time, and valid on machines whose clock is a little behind.
func TestSignedIsForAServer(t *testing.T) {
	a := open(t, t.TempDir(), "ghcr.io")
	key := newKey(t)
	serials := make(map[string]bool)
	for range 3 {
		chain, err := a.Sign(names("ghcr.io"), key.Public(), 48*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		certs := parse(t, chain)
		if len(certs) != 2 || !bytes.Equal(certs[1].Raw, parse(t, a.PEM())[0].Raw) {
			t.Fatalf("%d certificates, want its own and the authority's", len(certs))
		}
		leaf := certs[0]
		serials[leaf.SerialNumber.String()] = true
		if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.ExtKeyUsage) != 1 || leaf.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth {
			t.Errorf("it is a CA: %t, for %v %v; want no CA, for servers", leaf.IsCA, leaf.KeyUsage, leaf.ExtKeyUsage)
		}
		if left := time.Until(leaf.NotAfter); left > 48*time.Hour || left < 47*time.Hour || time.Since(leaf.NotBefore) < 30*time.Minute {
			t.Errorf("it is valid from %v until %v, want from before now for two days", leaf.NotBefore, leaf.NotAfter)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(a.PEM())
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
			t.Error("it is good for a client, too")
		}
	}
	if len(serials) != 3 {
		t.Errorf("3 certificates have %d numbers", len(serials))
	}
}

// A host that became known later is not covered by an authority that was made for
// others, which is told by name and changes nothing. Renewed, it is covered, and
// the old authority does not vouch for the new one.
func TestUncoveredHostNeedsARenewal(t *testing.T) {
	dir := t.TempDir()
	old := open(t, dir, "ghcr.io", "10.1.2.3")
	before := contents(t, dir)
	for _, c := range []struct {
		hosts     []string
		uncovered string // "" is covered
	}{
		{nil, ""}, {[]string{"ghcr.io"}, ""}, {[]string{"10.1.2.3"}, ""}, {[]string{"pkg.ghcr.io"}, ""}, {[]string{"::ffff:10.1.2.3"}, ""},
		{[]string{"ghcr.io", "quay.io"}, "quay.io"}, {[]string{"quay.io"}, "quay.io"}, {[]string{"xghcr.io"}, "xghcr.io"}, {[]string{"io"}, "io"},
		{[]string{"10.1.2.4"}, "10.1.2.4"}, {[]string{"::1"}, "::1"}, {[]string{"ghcr.io", "10.1.2.3", "127.0.0.1"}, "127.0.0.1"},
	} {
		a, err := ca.Open(dir, "test", c.hosts...)
		if c.uncovered == "" {
			if err != nil || a.Serial() != old.Serial() {
				t.Errorf("for %q: %v, want it as it is", c.hosts, err)
			}
			continue
		}
		var uncovered *ca.UncoveredError
		if !errors.As(err, &uncovered) || uncovered.Host != c.uncovered || uncovered.Path != old.Path() || a != nil {
			t.Errorf("for %q: %v, want that %s is not covered", c.hosts, err, c.uncovered)
		} else if !strings.Contains(err.Error(), c.uncovered) || !strings.Contains(err.Error(), old.Path()) {
			t.Errorf("error = %v, want one that names the host and the file", err)
		}
	}
	if after := contents(t, dir); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Error("asking whether hosts are covered changed the files")
	}
	// Whom the old one covers without being made for it, it does cover.
	if err := trusted(t, old, "pkg.ghcr.io", "pkg.ghcr.io"); err != nil {
		t.Error(err)
	}

	renewed, err := ca.Renew(dir, "test", "ghcr.io", "quay.io")
	if err != nil {
		t.Fatal(err)
	}
	if renewed.Serial() == old.Serial() {
		t.Error("renewed, it is the same")
	}
	again := open(t, dir, "ghcr.io", "quay.io")
	if again.Serial() != renewed.Serial() {
		t.Error("after a start it is another")
	}
	for host, ok := range map[string]bool{"ghcr.io": true, "quay.io": true, "10.1.2.3": false, "evil.example": false} {
		if err := trusted(t, again, host, host); (err == nil) != ok {
			t.Errorf("renewed, it is trusted for %s: %v, want %t", host, err, ok)
		}
	}
	chain, err := again.Sign(names("ghcr.io"), newKey(t).Public(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(t, old, parse(t, chain)[0], "ghcr.io"); err == nil {
		t.Error("who trusts the old one trusts the new one")
	}
	after := contents(t, dir)
	if len(after) != 2 || !strings.HasPrefix(after["test-ca.key"], "-rw------- ") || !strings.HasPrefix(after["test-ca.crt"], "-rw-r--r-- ") {
		t.Errorf("the folder holds %.20q, want a key of mode 0600 and a certificate of mode 0644", after)
	}
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "test-ca.crt"), filepath.Join(dir, "test-ca.key")); err != nil {
		t.Errorf("key and certificate: %v", err)
	}
}

// A folder that cannot be written, or is none, is an error that names it.
func TestFolderThatIsNoneIsTold(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Open(file, "test"); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("error = %v, want one that names %s", err, file)
	}
	if _, err := ca.Renew(file, "test"); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("error = %v, want one that names %s", err, file)
	}
}
