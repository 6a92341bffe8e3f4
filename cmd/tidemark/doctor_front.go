package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"tidemark/proxy/admin"
)

// lookTimeout bounds each look at the registry from outside.
const lookTimeout = 5 * time.Second

// front looks at the registry as a client does, step by step: the first that fails
// is what is to be mended.
func (d *doctor) front(ctx context.Context, r admin.RegistryStatus) []finding {
	address := d.address(r)
	u, err := parseRegistry(address)
	if err != nil {
		return []finding{bad("registry", "%v", err)}
	}
	found, ok := reach(ctx, u)
	if !ok {
		return found
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	if u.Scheme == "https" {
		var f finding
		if f, ok = d.handshake(ctx, u, roots, r); !ok {
			return append(found, f)
		}
		found = append(found, f)
	}
	found = append(found, ping(ctx, &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}, "registry", u.String(), r))
	if r.Intercept != "" && len(r.Upstream) > 0 {
		found = append(found, d.proxy(ctx, u, r)...)
	}
	return found
}

// reach resolves the name and connects to the port.
func reach(ctx context.Context, u *url.URL) (found []finding, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	host := u.Hostname()
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	if _, err := netip.ParseAddr(host); err != nil {
		addrs, err := net.DefaultResolver.LookupHost(ctx, host)
		if err != nil {
			return []finding{bad("name", "%s: clients on this machine cannot find it: %v", host, err)}, false
		}
		found = append(found, good("name", "%s is %s", host, strings.Join(addrs, ", ")))
	}
	addr := net.JoinHostPort(host, port)
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return append(found, bad("port", "%s: nothing answers: %v", addr, err)), false
	}
	conn.Close()
	return append(found, good("port", "%s answers", addr)), true
}

// handshake speaks TLS as a client that trusts what this machine trusts, and then
// as one that trusts the server's own CA, which is added to roots.
func (d *doctor) handshake(ctx context.Context, u *url.URL, roots *x509.CertPool, r admin.RegistryStatus) (finding, bool) {
	addr := u.Host
	if u.Port() == "" {
		addr = net.JoinHostPort(u.Hostname(), "443")
	}
	cert, err := certificate(ctx, addr, u.Hostname(), roots)
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) && r.TLS == "internal" {
		pem, gerr := d.get(ctx, "/ca/internal.crt", nil)
		if gerr != nil || !roots.AppendCertsFromPEM(pem) {
			return bad("tls", "%s: %v; the CA of the server could not be had: %v", addr, err, gerr), false
		}
		if cert, err = certificate(ctx, addr, u.Hostname(), roots); err == nil {
			return remark("tls", "the certificate of %s is by the server's own CA: clients must trust it, as tidemark setup has it; it is valid until %s", addr, stamp(cert.NotAfter)), true
		}
	}
	var plain tls.RecordHeaderError
	if errors.As(err, &plain) {
		return bad("tls", "%s speaks plain HTTP: its address begins with http://", addr), false
	}
	if err != nil {
		return bad("tls", "%s: a client refuses the certificate: %v", addr, err), false
	}
	if left := time.Until(cert.NotAfter); left < 7*24*time.Hour && left < cert.NotAfter.Sub(cert.NotBefore)/3 {
		return bad("tls", "the certificate of %s ends at %s and was not renewed", addr, stamp(cert.NotAfter)), true
	}
	return good("tls", "%s has a certificate that this machine trusts, valid until %s", addr, stamp(cert.NotAfter)), true
}

func certificate(ctx context.Context, addr, name string, roots *x509.CertPool) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	conn, err := (&tls.Dialer{Config: &tls.Config{RootCAs: roots, ServerName: name}}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

// ping asks what every client asks first.
func ping(ctx context.Context, t *http.Transport, what, address string, r admin.RegistryStatus) finding {
	defer t.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, 3*lookTimeout) // with passthrough it is upstream's answer
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(address, "/")+"/v2/", nil)
	if err != nil {
		return bad(what, "%v", err)
	}
	resp, err := t.RoundTrip(req)
	if errors.Is(err, errLogin) {
		return good(what, "%s: the proxy wants clients to log in (%s)", address, r.Auth)
	}
	if err != nil {
		if r.Clients {
			return remark(what, "%s wants a certificate of its clients, which this command has not: %v", address, err)
		}
		return bad(what, "%s: %v", address, err)
	}
	resp.Body.Close()
	switch {
	case resp.Header.Get("Docker-Distribution-Api-Version") == "":
		return bad(what, "%s is answered by something that is no registry: %s", address, resp.Status)
	case resp.StatusCode == http.StatusOK && r.Auth == "passthrough":
		return good(what, "%s answers; clients have what they may have upstream (passthrough)", address)
	case resp.StatusCode == http.StatusOK:
		return good(what, "%s answers, and lets everybody in", address)
	case resp.StatusCode == http.StatusUnauthorized:
		return good(what, "%s answers, and wants clients to log in (%s)", address, r.Auth)
	}
	return bad(what, "%s: %s", address, resp.Status)
}

// proxy looks at the intercepting proxy: whether it answers for an upstream's name
// with a certificate of its CA.
func (d *doctor) proxy(ctx context.Context, u *url.URL, r admin.RegistryStatus) []finding {
	pem, err := d.get(ctx, "/ca/intercept.crt", nil)
	roots := x509.NewCertPool()
	if err != nil || !roots.AppendCertsFromPEM(pem) {
		return []finding{bad("proxy", "its CA could not be had: %v", err)}
	}
	at := r.Intercept
	if host, port, err := net.SplitHostPort(at); err == nil && isUnspecified(host) {
		at = net.JoinHostPort(u.Hostname(), port) // by the name that the registry has
	}
	through := &http.Transport{
		Proxy:           http.ProxyURL(&url.URL{Scheme: "http", Host: at}),
		TLSClientConfig: &tls.Config{RootCAs: roots},
		OnProxyConnectResponse: func(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
			if resp.StatusCode == http.StatusProxyAuthRequired {
				return errLogin
			}
			return nil
		},
	}
	f := ping(ctx, through, "proxy", "https://"+r.Upstream[0], r)
	f.Says = "through " + at + ": " + f.Says
	return []finding{f}
}

// errLogin is that a proxy wants to know who is there.
var errLogin = errors.New("the proxy wants a login")
