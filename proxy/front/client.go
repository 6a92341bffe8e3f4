package front

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// RequireClients returns cfg for clients who present a certificate of the
// authority in a file, and for no others. The file is read again when it has
// changed; while it cannot be, the authority from before counts.
func RequireClients(cfg *tls.Config, caFile string, log zerolog.Logger) (*tls.Config, error) {
	f := &clientCA{path: caFile, open: cfg, log: log}
	if err := f.load(); err != nil {
		return nil, err
	}
	strict := cfg.Clone()
	strict.GetConfigForClient = f.config
	return strict, nil
}

// clientCA is an authority of clients that follows its file.
type clientCA struct {
	path string
	open *tls.Config // which asks nobody for a certificate
	log  zerolog.Logger

	mu     sync.Mutex
	strict *tls.Config
	stamp  time.Time
	looked time.Time
}

// load reads the file. f.mu is held, or f is not shared yet.
func (f *clientCA) load() error {
	info, err := os.Stat(f.path)
	if err != nil {
		return fmt.Errorf("CA of clients: %w", err)
	}
	pem, err := os.ReadFile(f.path)
	if err != nil {
		return fmt.Errorf("CA of clients: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return fmt.Errorf("CA of clients: %s holds no PEM certificate", f.path)
	}
	// Sessions that the old CA had let begin are not resumed: crypto/tls checks the
	// chain again.
	f.strict = f.open.Clone()
	f.strict.ClientAuth, f.strict.ClientCAs = tls.RequireAndVerifyClientCert, pool
	f.stamp = info.ModTime()
	return nil
}

// config is tls.Config.GetConfigForClient.
func (f *clientCA) config(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	if slices.Equal(hello.SupportedProtos, []string{acmeTLS}) {
		return f.open, nil // the ACME server: net/http hangs up after the handshake
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.looked) >= fileCheck {
		f.looked = now
		info, err := os.Stat(f.path)
		if err == nil && !info.ModTime().Equal(f.stamp) {
			err = f.load()
		}
		if err != nil {
			f.log.Warn().Err(err).Msg("the CA of clients could not be read again; the old one counts")
		}
	}
	return f.strict, nil
}

// ClientName is what the certificate of a client calls it, "" without one.
func ClientName(r *http.Request) string {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return ""
	}
	return r.TLS.PeerCertificates[0].Subject.CommonName
}
