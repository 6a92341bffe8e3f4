package config

import (
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// validate checks what each value says, and what they say together. It reads
// the files of secrets, dials nothing and writes nothing.
func (c *Config) validate(d *decoder) {
	if c.Data == "" {
		d.fail("data", nil, "want a folder")
	}
	c.validateRegistry(d)
	c.validateAdmin(d)
	c.validateAddresses(d)
	for _, name := range sortedKeys(c.Upstreams) {
		c.validateUpstream(d, name, c.Upstreams[name])
	}
	if c.Upstreams[c.DefaultUpstream] == nil && !d.isSpoiled("upstreams") {
		d.fail("default_upstream", nil, "%q is not one of upstreams: %s. Those that are built in are gone once there is upstreams: add it there, or set default_upstream to another", c.DefaultUpstream, strings.Join(sortedKeys(c.Upstreams), ", "))
	}
	c.validateHosts(d)
	if c.Tags.Refresh != RefreshBlocking && c.Tags.Refresh != RefreshBackground {
		d.fail("tags.refresh", nil, "%q is neither %s nor %s", c.Tags.Refresh, RefreshBlocking, RefreshBackground)
	}
	if c.Cache.MaxBytes.Percent == 0 && c.Cache.MaxBytes.Bytes == 0 {
		d.fail("cache.max_bytes", nil, "a cache of no size keeps nothing")
	}
	if n := c.Cache.MaxBytes.Bytes; n > 0 && n < leastCache {
		d.fail("cache.max_bytes", nil, "a cache of %d bytes holds no image; sizes are written 10GiB, shares 80%%", n)
	}
	if r := c.Cache.Scrub.Rate; r.Percent != 0 || r.Bytes == 0 {
		d.fail("cache.scrub.rate", nil, "want a size, such as 32MiB, that is read a second")
	}
	if c.Cache.MinFree.Percent == 100 {
		d.fail("cache.min_free", nil, "a cache that leaves everything free keeps nothing")
	}
	c.validateAudit(d)
	c.Watch.validate(d)
	c.validateNotify(d)
	if o := c.Audit.Origin; o != "" && !originGrammar.MatchString(o) {
		d.fail("audit.origin", nil, "%q is not a name such as tidemark.example/prod: no spaces, no +", o)
	}
}

// leastCache is less than the smallest images have, in bytes.
const leastCache = 64 << 10

func (c *Config) validateAudit(d *decoder) {
	a := &c.Audit
	if a.DeleteAfter.Observations == 0 {
		d.fail("audit.delete_after.observations", nil, "a tag cannot be deleted without an answer that says so")
	}
	if a.FlapWindow == 0 {
		d.fail("audit.flap_window", nil, "want a time such as 15m")
	}
	if a.GapFactor == 0 {
		d.fail("audit.gap_factor", nil, "want a number such as 3: no answer at all would be a gap")
	}
	if a.Keep.Days > daysMost {
		d.fail("audit.keep.days", nil, "%d days are more than the %d that can be kept", a.Keep.Days, daysMost)
	}
	if a.GapFactor > gapFactorMost {
		d.fail("audit.gap_factor", nil, "%d is more than %d: nothing would ever be a gap", a.GapFactor, gapFactorMost)
	}
	if a.Gaps != GapsTell && a.Gaps != GapsRefuse {
		d.fail("audit.gaps", nil, "%q is neither %s nor %s", a.Gaps, GapsTell, GapsRefuse)
	}
	if a.ExposureKeep == 0 {
		d.fail("audit.exposure_keep", nil, "want a time such as 90d")
	}
	seen := make(map[string]int)
	for i := range a.Publish {
		p := &a.Publish[i]
		path := fmt.Sprintf("audit.publish[%d]", i)
		p.validate(d, path)
		place := p.Path + " " + string(p.URL)
		if before, twice := seen[place]; twice {
			d.fail(path, nil, "is the same place as audit.publish[%d]", before)
		}
		seen[place] = i
	}
}

func (w *Watch) validate(d *decoder) {
	for _, t := range []struct {
		key string
		d   Duration
	}{{"interval", w.Interval}, {"floor", w.Floor}, {"ceiling", w.Ceiling}} {
		if t.d == 0 {
			d.fail("watch."+t.key, nil, "want a time such as 15m; to watch nothing, leave watch.refs out and set watch.seen to false")
		}
	}
	if w.Floor > w.Ceiling {
		d.fail("watch.floor", nil, "%v is more than watch.ceiling, %v", w.Floor, w.Ceiling)
	}
}

// Bounds of numbers that become times.
const (
	daysMost      = 36_500 // a hundred years
	gapFactorMost = 10_000
)

func (p *Publish) validate(d *decoder, path string) {
	switch p.Type {
	case PublishFile:
		if p.Path == "" {
			d.fail(path+".path", nil, "type file needs it")
		}
		if p.URL != "" || p.SecretFile != "" {
			d.failQuietly(path, "url and secret_file are for type webhook")
		}
	case PublishWebhook:
		if u, err := url.Parse(string(p.URL)); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			d.failQuietly(path+".url", "want an address such as https://witness.example/checkpoints")
		}
		if p.Path != "" {
			d.fail(path+".path", nil, "is for type file")
		}
		if p.SecretFile != "" {
			var err error
			if p.Secret, err = readSecret(p.SecretFile); err != nil {
				d.fail(path+".secret_file", nil, "%v", err)
			}
		}
	default:
		d.fail(path+".type", nil, "%q is neither file nor webhook", p.Type)
	}
}

// originGrammar is what c2sp.org/signed-note allows for the name of a key.
var originGrammar = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/:-]{0,200}$`)

func sortedKeys(m map[string]*Upstream) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func (c *Config) validateRegistry(d *decoder) {
	local := c.validateListen(d, "registry.listen", c.Registry.Listen)
	c.validateAccess(d)
	t := &c.Registry.TLS
	switch t.Mode {
	case TLSNone:
		if !local && !t.Insecure {
			d.fail("registry.tls.mode", nil, "none is for loopback: %s can be reached from elsewhere; use files or internal, or set registry.tls.insecure", c.Registry.Listen)
		}
	case TLSFiles:
		for _, f := range []struct{ key, path string }{{"cert_file", t.CertFile}, {"key_file", t.KeyFile}} {
			if f.path == "" {
				d.fail("registry.tls."+f.key, nil, "mode files needs it")
			} else if _, err := os.Stat(f.path); err != nil {
				d.fail("registry.tls."+f.key, nil, "%v", err)
			}
		}
	case TLSInternal:
		if len(t.Hosts) == 0 && local {
			host, _, _ := net.SplitHostPort(c.Registry.Listen)
			t.Hosts = []string{"localhost"}
			if host != "localhost" {
				t.Hosts = append(t.Hosts, host)
			}
		}
		if len(t.Hosts) == 0 {
			d.fail("registry.tls.hosts", nil, "mode internal needs the names or addresses by which clients reach this server")
		}
	case TLSACME:
		if len(t.Hosts) == 0 {
			d.fail("registry.tls.hosts", nil, "mode acme needs the names to have certificates for")
		}
		for i, h := range t.Hosts {
			_, aerr := netip.ParseAddr(h)
			if aerr == nil || !hostGrammar.MatchString(strings.ToLower(h)) || strings.Contains(h, ":") {
				d.fail(fmt.Sprintf("registry.tls.hosts[%d]", i), nil, "%q is not a host name, which mode acme is for", h)
			}
		}
		if u, err := url.Parse(t.ACMEDirectory); err != nil || u.Scheme != "https" || u.Host == "" {
			d.fail("registry.tls.acme_directory", nil, "%q is not an address such as https://acme.example/directory", t.ACMEDirectory)
		}
		validateCAFile(d, "registry.tls.acme_ca_file", t.ACMECAFile)
		c.validateListen(d, "registry.tls.acme_http", t.ACMEHTTP)
	default:
		d.fail("registry.tls.mode", nil, "%q is not one of %s, %s, %s, %s", t.Mode, TLSNone, TLSFiles, TLSACME, TLSInternal)
	}
	if t.Mode == TLSNone && t.ClientCAFile != "" {
		d.fail("registry.tls.client_ca_file", nil, "clients present certificates only with TLS: registry.tls.mode is none")
	}
	validateCAFile(d, "registry.tls.client_ca_file", t.ClientCAFile)
	for _, unused := range []struct {
		key   string
		set   bool
		modes []string
	}{
		{"cert_file", t.CertFile != "", []string{TLSFiles}}, {"key_file", t.KeyFile != "", []string{TLSFiles}},
		{"hosts", len(t.Hosts) > 0, []string{TLSACME, TLSInternal}},
		{"email", t.Email != "", []string{TLSACME}}, {"acme_ca_file", t.ACMECAFile != "", []string{TLSACME}},
	} {
		if unused.set && !slices.Contains(unused.modes, t.Mode) {
			d.fail("registry.tls."+unused.key, nil, "is for mode %s, not %s", strings.Join(unused.modes, " or mode "), t.Mode)
		}
	}
}

// validateCAFile checks the file of a key that names certificates to trust.
func validateCAFile(d *decoder, path, file string) {
	if file == "" {
		return
	}
	if pem, err := os.ReadFile(file); err != nil {
		d.fail(path, nil, "%v", err)
	} else if !x509.NewCertPool().AppendCertsFromPEM(pem) {
		d.fail(path, nil, "%s holds no PEM certificate", file)
	}
}

func (c *Config) validateAdmin(d *decoder) {
	local := c.validateListen(d, "admin.listen", c.Admin.Listen)
	if c.Admin.FeedTokenFile != "" {
		var err error
		if c.Admin.FeedToken, err = readSecret(c.Admin.FeedTokenFile); err != nil {
			d.fail("admin.feed_token_file", nil, "%v", err)
		}
		if c.Admin.TokenFile == "" {
			d.fail("admin.feed_token_file", nil, "has no effect without admin.token_file: the feeds are open to everybody who reaches the address")
		}
	}
	if c.Admin.TokenFile == "" {
		if !local {
			d.fail("admin.token_file", nil, "%s can be reached from elsewhere: a token is required", c.Admin.Listen)
		}
		return
	}
	var err error
	if c.Admin.Token, err = readSecret(c.Admin.TokenFile); err != nil {
		d.fail("admin.token_file", nil, "%v", err)
	}
}

// validateListen checks an address and tells whether it is loopback.
func (c *Config) validateListen(d *decoder, path, addr string) bool {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || !isPort(port) {
		d.fail(path, nil, "%q is not an address such as 127.0.0.1:5050", addr)
		return true
	}
	return isLoopback(host)
}

func isPort(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil
}

func isLoopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && a.IsLoopback()
}

// hostGrammar is a host name as a request has it, with an optional port.
var hostGrammar = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?$`)

func (c *Config) validateUpstream(d *decoder, name string, u *Upstream) {
	path := "upstreams[" + name + "]"
	if !hostGrammar.MatchString(name) {
		d.fail(path, nil, "a name is a host such as ghcr.io, in lower case")
	}
	for i, e := range u.Endpoints {
		epath := fmt.Sprintf("%s.endpoints[%d]", path, i)
		v, err := url.Parse(e)
		switch {
		case err != nil || v.Host == "":
			d.fail(epath, nil, "%q is not an address such as https://registry.example", redactURL(e))
		case v.Scheme != "http" && v.Scheme != "https":
			d.fail(epath, nil, "scheme %q is not http or https", v.Scheme)
		case v.User != nil:
			d.failQuietly(epath, "credentials do not belong into an address: use username and password_file")
		case v.Port() != "" && !isPort(v.Port()):
			d.fail(epath, nil, "%q is not a port", v.Port())
		case v.RawQuery != "" || v.Fragment != "":
			d.fail(epath, nil, "an address has no query and no fragment")
		}
	}
	for i, h := range u.Hosts {
		if !hostGrammar.MatchString(strings.ToLower(h)) {
			d.fail(fmt.Sprintf("%s.hosts[%d]", path, i), nil, "%q is not a host name", h)
		}
	}
	if u.History != HistoryOCI && u.History != HistoryQuay && u.History != HistoryChainguard {
		d.fail(path+".history", nil, "%q is not one of %s, %s, %s", u.History, HistoryOCI, HistoryQuay, HistoryChainguard)
	}
	if u.Kind != KindRegistry && u.Kind != KindMirror {
		d.fail(path+".kind", nil, "%q is neither registry nor mirror", u.Kind)
	}
	c.validateCredentials(d, path, u)
	validateCAFile(d, path+".ca_file", u.CAFile)
}

// validateHosts refuses a request host that would mean two upstreams.
func (c *Config) validateHosts(d *decoder) {
	owner := make(map[string]string)
	for name := range c.Upstreams {
		owner[name] = name
	}
	for _, name := range sortedKeys(c.Upstreams) {
		for i, h := range c.Upstreams[name].Hosts {
			h = strings.ToLower(h)
			if other := owner[h]; other != "" && other != name {
				d.fail(fmt.Sprintf("upstreams[%s].hosts[%d]", name, i), nil, "%s means %s already", h, other)
			}
			owner[h] = name
		}
	}
}

// failQuietly is fail without an excerpt, for lines that hold a secret.
func (d *decoder) failQuietly(path, message string) {
	e := &Error{Path: path, Message: message}
	if tok := d.tokens[path]; tok != nil {
		e.Line = tok.Position.Line
	}
	d.errs = append(d.errs, e)
}

// redactURL takes the user off something that may not even be a URL.
func redactURL(s string) string {
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		return "…" + s[i:]
	}
	return s
}
