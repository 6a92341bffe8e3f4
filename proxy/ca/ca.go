// Package ca is a certificate authority of our own: a key and a certificate in a
// folder, and what they sign.
package ca

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
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// An Authority signs certificates for servers. Its certificate is to be trusted
// by clients; the key beside it has mode 0600.
type Authority struct {
	path string // of the certificate
	cert *x509.Certificate
	key  crypto.Signer
	pem  []byte
}

// valid is how long an authority can be trusted, in which nobody has to be told
// of another.
const valid = 10 * 365 * 24 * time.Hour

// Open reads the authority NAME-ca.crt with its key in dir, or makes it. One that
// is made for hosts can sign for these and what is below them only, and clients
// refuse what it signs for others (RFC 5280, section 4.2.1.10); one that is there
// and cannot sign for all of hosts is an UncoveredError.
func Open(dir, name string, hosts ...string) (*Authority, error) {
	certFile, _ := files(dir, name)
	get := read // what is there is never replaced, however broken it is
	if _, err := os.Stat(certFile); errors.Is(err, fs.ErrNotExist) {
		get = func(dir, name string) (*Authority, error) { return create(dir, name, hosts) }
	}
	a, err := get(dir, name)
	if err != nil {
		return nil, fmt.Errorf("CA %s in %s: %w", name, dir, err)
	}
	for _, h := range hosts {
		if !a.covers(h) {
			return nil, &UncoveredError{a.path, h}
		}
	}
	return a, nil
}

// Renew makes the authority anew, for hosts. Clients must trust the new one then.
func Renew(dir, name string, hosts ...string) (*Authority, error) {
	certFile, _ := files(dir, name)
	if err := os.Remove(certFile); err != nil && !errors.Is(err, fs.ErrNotExist) { // a crash from here on leaves none, and another is made
		return nil, fmt.Errorf("CA %s in %s: %w", name, dir, err)
	}
	a, err := create(dir, name, hosts)
	if err != nil {
		return nil, fmt.Errorf("CA %s in %s: %w", name, dir, err)
	}
	return a, nil
}

// An UncoveredError is that an authority was made before a host was known.
type UncoveredError struct{ Path, Host string }

func (e *UncoveredError) Error() string {
	return fmt.Sprintf("the CA %s cannot sign for %s", e.Path, e.Host)
}

// Path is the file of the certificate.
func (a *Authority) Path() string { return a.path }

// PEM is the certificate.
func (a *Authority) PEM() []byte { return a.pem }

// Serial tells authorities apart.
func (a *Authority) Serial() string { return a.cert.SerialNumber.Text(36) }

func files(dir, name string) (cert, key string) {
	return filepath.Join(dir, name+"-ca.crt"), filepath.Join(dir, name+"-ca.key")
}

func read(dir, name string) (*Authority, error) {
	certFile, keyFile := files(dir, name)
	certPEM, err := os.ReadFile(certFile)
	if err != nil {
		return nil, err
	}
	keyPEM, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("its key: %w; if it is lost, remove the certificate, too, and another CA is made", err)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if err == nil && (!ok || !pair.Leaf.IsCA) {
		err = errors.New("it is no CA")
	}
	if err != nil {
		return nil, fmt.Errorf("%s with its key %s: %w; put back the right ones, or remove both, and another CA is made", certFile, keyFile, err)
	}
	return &Authority{certFile, pair.Leaf, signer, certPEM}, nil
}

func create(dir, name string, hosts []string) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{CommonName: "tidemark " + name + " CA " + now.UTC().Format("2006-01-02")},
		NotBefore:             now.Add(-time.Hour), // clocks differ
		NotAfter:              now.Add(valid),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, // and for nothing else
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	constrain(tmpl, hosts)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	certFile, keyFile := files(dir, name)
	// The key first: a certificate without its key would be found and be of no use.
	if err := replaceFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600); err != nil {
		return nil, err
	}
	if err := replaceFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		return nil, err
	}
	return read(dir, name)
}

// constrain limits what a CA can sign for. A kind of name that is not mentioned
// would not be limited at all.
func constrain(tmpl *x509.Certificate, hosts []string) {
	if len(hosts) == 0 {
		return
	}
	tmpl.PermittedDNSDomainsCritical = true
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			if v4 := ip.To4(); v4 != nil {
				ip = v4
			}
			tmpl.PermittedIPRanges = append(tmpl.PermittedIPRanges, &net.IPNet{IP: ip, Mask: net.CIDRMask(8*len(ip), 8*len(ip))})
			continue
		}
		tmpl.PermittedDNSDomains = append(tmpl.PermittedDNSDomains, h)
	}
	if tmpl.PermittedIPRanges == nil {
		tmpl.ExcludedIPRanges = []*net.IPNet{{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, {IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}}
	}
	if tmpl.PermittedDNSDomains == nil {
		tmpl.ExcludedDNSDomains = []string{""}
	}
}

// covers tells whether a can sign for a host.
func (a *Authority) covers(host string) bool {
	c := a.cert
	if c.PermittedDNSDomains == nil && c.PermittedIPRanges == nil {
		return true
	}
	if ip := net.ParseIP(host); ip != nil {
		return slices.ContainsFunc(c.PermittedIPRanges, func(n *net.IPNet) bool { return n.Contains(ip) })
	}
	return slices.ContainsFunc(c.PermittedDNSDomains, func(d string) bool { return host == d || strings.HasSuffix(host, "."+d) })
}

// Sign completes a certificate for a server, which says for which names, and
// returns it with the authority's as PEM.
func (a *Authority) Sign(tmpl *x509.Certificate, public crypto.PublicKey, lasts time.Duration) ([]byte, error) {
	now := time.Now()
	tmpl.SerialNumber = newSerial()
	tmpl.NotBefore, tmpl.NotAfter = now.Add(-time.Hour), now.Add(lasts)
	tmpl.KeyUsage, tmpl.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, public, a.key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), a.pem...), nil
}

// replaceFile writes a file so that a crash leaves all of it or nothing.
func replaceFile(path string, data []byte, mode fs.FileMode) error {
	if err := os.Remove(path + ".tmp"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	if _, err = f.Write(data); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

func newSerial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic("ca: " + err.Error()) // crypto/rand never fails
	}
	return n
}
