package front

import (
	"context"
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
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/rs/zerolog"
	"go.uber.org/zap"
)

// tlsConfig is what every listener with TLS shares.
func tlsConfig(get func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: get, NextProtos: []string{"h2", "http/1.1"}}
}

// Files returns the configuration of a listener whose certificate and key are
// read from files, and read again when they have changed. While the new ones
// cannot be read, the old ones are used.
func Files(certFile, keyFile string, log zerolog.Logger) (*tls.Config, error) {
	f := &fileCert{certFile: certFile, keyFile: keyFile, log: log}
	if err := f.load(); err != nil {
		return nil, err
	}
	return tlsConfig(f.get), nil
}

// fileCert is a certificate that follows its files.
type fileCert struct {
	certFile, keyFile string
	log               zerolog.Logger

	mu      sync.Mutex
	cert    *tls.Certificate
	stamp   [2]time.Time // modification times of what cert was read from
	checked time.Time
}

// fileCheck is how often files that may change are looked at.
const fileCheck = time.Second

func (f *fileCert) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.checked) >= fileCheck {
		f.checked = now
		if stamp, err := f.stat(); err != nil || stamp != f.stamp {
			if err == nil {
				err = f.load()
			}
			if err != nil {
				f.log.Warn().Err(err).Msg("certificate could not be read again; the old one is used")
			}
		}
	}
	return f.cert, nil
}

func (f *fileCert) stat() (stamp [2]time.Time, err error) {
	for i, name := range []string{f.certFile, f.keyFile} {
		info, err := os.Stat(name)
		if err != nil {
			return stamp, err
		}
		stamp[i] = info.ModTime()
	}
	return stamp, nil
}

// load reads the files. f.mu is held, or f is not shared yet.
func (f *fileCert) load() error {
	stamp, err := f.stat()
	if err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	cert, err := tls.LoadX509KeyPair(f.certFile, f.keyFile)
	if err != nil {
		return fmt.Errorf("certificate %s with key %s: %w", f.certFile, f.keyFile, err)
	}
	f.cert, f.stamp = &cert, stamp
	return nil
}

// Internal is a certificate authority of our own, for hosts that no public one
// can know. Its certificate is dir/internal-ca.crt, to be trusted by clients;
// the key beside it has mode 0600. Server certificates are made, kept and
// renewed by certmagic.
type Internal struct {
	dir   string
	hosts []string
	log   zerolog.Logger
	ca    *authority
	certs *certmagic.Cache
}

const (
	caValid   = 10 * 365 * 24 * time.Hour
	leafValid = 30 * 24 * time.Hour
)

// NewInternal reads or makes the authority in dir. It starts nothing.
func NewInternal(dir string, hosts []string, log zerolog.Logger) (*Internal, error) {
	ca, err := openAuthority(dir)
	if err != nil {
		return nil, fmt.Errorf("internal CA: %w", err)
	}
	return &Internal{dir: dir, hosts: hosts, log: log, ca: ca}, nil
}

// CAFile is the path of the certificate that clients must trust.
func (i *Internal) CAFile() string { return filepath.Join(i.dir, caFile) }

// Start gets a certificate for every host and returns the configuration of a
// listener that presents them. They are renewed until Stop.
func (i *Internal) Start(ctx context.Context) (*tls.Config, error) {
	logger := zap.New(zapToZerolog{log: i.log})
	var cfg *certmagic.Config
	i.certs = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) { return cfg, nil },
		Logger:           logger,
	})
	cfg = certmagic.New(i.certs, certmagic.Config{
		Storage:           &certmagic.FileStorage{Path: i.dir},
		Issuers:           []certmagic.Issuer{i.ca},
		OCSP:              certmagic.OCSPConfig{DisableStapling: true},
		DefaultServerName: i.hosts[0],
		DisableARI:        true,
		Logger:            logger,
	})
	if err := cfg.ManageSync(ctx, i.hosts); err != nil {
		i.Stop()
		return nil, fmt.Errorf("internal certificates: %w", err)
	}
	return tlsConfig(cfg.GetCertificate), nil
}

// Stop ends renewals.
func (i *Internal) Stop() { i.certs.Stop() }

// An authority signs server certificates. It is a certmagic.Issuer.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	pem  []byte
}

const (
	caFile = "internal-ca.crt"
	caKey  = "internal-ca.key"
)

func openAuthority(dir string) (*authority, error) {
	certPEM, err := os.ReadFile(filepath.Join(dir, caFile))
	if errors.Is(err, fs.ErrNotExist) {
		return newAuthority(dir)
	}
	if err != nil {
		return nil, err
	}
	keyPEM, err := os.ReadFile(filepath.Join(dir, caKey))
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: key cannot sign", dir)
	}
	return &authority{pair.Leaf, signer, certPEM}, nil
}

func newAuthority(dir string) (*authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "tidemark internal CA " + now.UTC().Format("2006-01-02")},
		NotBefore:             now.Add(-time.Hour), // clocks differ
		NotAfter:              now.Add(caValid),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	// The key first: a certificate without its key would be found and be of no use.
	if err := replaceFile(filepath.Join(dir, caKey), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600); err != nil {
		return nil, err
	}
	if err := replaceFile(filepath.Join(dir, caFile), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		return nil, err
	}
	return openAuthority(dir)
}

// replaceFile writes a file so that a crash leaves all of it or nothing.
func replaceFile(path string, data []byte, mode fs.FileMode) error {
	if err := os.WriteFile(path+".tmp", data, mode); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

// Issue implements certmagic.Issuer.
func (a *authority) Issue(_ context.Context, csr *x509.CertificateRequest) (*certmagic.IssuedCertificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial,
		Subject:      csr.Subject,
		DNSNames:     csr.DNSNames,
		IPAddresses:  csr.IPAddresses,
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(leafValid),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a.cert, csr.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	return &certmagic.IssuedCertificate{Certificate: append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), a.pem...)}, nil
}

// IssuerKey implements certmagic.Issuer. Certificates of another CA are not
// taken for ours.
func (a *authority) IssuerKey() string { return "internal-" + a.cert.SerialNumber.Text(36)[:8] }
