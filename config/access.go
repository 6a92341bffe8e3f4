package config

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
)

// validateAccess checks who may pull, and through what.
func (c *Config) validateAccess(d *decoder) {
	r := &c.Registry
	switch r.Auth.Mode {
	case AuthNone:
	case AuthBasic:
		if r.Auth.HtpasswdFile == "" {
			d.fail("registry.auth.htpasswd_file", nil, "mode basic needs it; htpasswd -B makes one")
		} else if _, err := os.Stat(r.Auth.HtpasswdFile); err != nil {
			d.fail("registry.auth.htpasswd_file", nil, "%v", err)
		}
		if r.Push == PushPass {
			d.fail("registry.push", nil, "pass needs the client's own credentials for the upstream, and registry.auth.mode basic takes them for this server's; use passthrough")
		}
	case AuthPassthrough:
		if c.Tags.Offline || c.Audit.Preset == "airgap" {
			d.fail("registry.auth.mode", nil, "passthrough asks upstreams what a client may have, and offline none is asked; use basic or none")
		}
	default:
		d.fail("registry.auth.mode", nil, "%q is not one of %s, %s, %s", r.Auth.Mode, AuthNone, AuthBasic, AuthPassthrough)
	}
	if r.Auth.HtpasswdFile != "" && r.Auth.Mode != AuthBasic {
		d.fail("registry.auth.htpasswd_file", nil, "is for mode basic, not %s", r.Auth.Mode)
	}
	if r.Push != PushDeny && r.Push != PushPass {
		d.fail("registry.push", nil, "%q is neither %s nor %s", r.Push, PushDeny, PushPass)
	}
	c.validateViews(d)
	c.validateIntercept(d)
}

// validateAddresses refuses two listeners on one address.
func (c *Config) validateAddresses(d *decoder) {
	taken := make(map[string]string)
	type listener struct{ path, addr string }
	all := []listener{
		{"registry.listen", c.Registry.Listen}, {"admin.listen", c.Admin.Listen}, {"registry.intercept.listen", c.Registry.Intercept.Listen},
	}
	for i, v := range c.Registry.Views {
		all = append(all, listener{fmt.Sprintf("registry.views[%d].listen", i), v.Listen})
	}
	for _, l := range all {
		if other := taken[l.addr]; other != "" && !strings.HasSuffix(l.addr, ":0") {
			d.fail(l.path, nil, "%s is %s already", l.addr, other)
		}
		if l.addr != "" {
			taken[l.addr] = l.path
		}
	}
}

// validateViews checks the addresses that are bound to the past, which let in whom
// the registry's own does.
func (c *Config) validateViews(d *decoder) {
	for i, v := range c.Registry.Views {
		path := fmt.Sprintf("registry.views[%d]", i)
		if v.Listen == "" {
			d.fail(path+".listen", nil, "want an address such as 127.0.0.1:5060")
			continue
		}
		if local := c.validateListen(d, path+".listen", v.Listen); !local && c.Registry.TLS.Mode == TLSNone && !c.Registry.TLS.Insecure {
			d.fail(path+".listen", nil, "%s can be reached from elsewhere, and registry.tls.mode is none", v.Listen)
		}
		if v.AsOf.IsZero() == (v.At == nil) && !d.isSpoiled(path+".asof") && !d.isSpoiled(path+".at") {
			d.fail(path, nil, "want either asof, a time, or at, the index of an entry of the log")
		}
	}
}

func (c *Config) validateIntercept(d *decoder) {
	i := &c.Registry.Intercept
	for n, h := range i.Tunnel {
		host, port, err := net.SplitHostPort(h)
		if err != nil {
			host, port = h, "443"
		}
		if !hostGrammar.MatchString(strings.ToLower(host)) && net.ParseIP(host) == nil || !isPort(port) {
			d.fail(fmt.Sprintf("registry.intercept.tunnel[%d]", n), nil, "%q is not a host such as auth.docker.io", h)
		}
	}
	if i.Listen == "" {
		if len(i.Tunnel) > 0 {
			d.fail("registry.intercept.tunnel", nil, "is of no use without registry.intercept.listen")
		}
		return
	}
	if local := c.validateListen(d, "registry.intercept.listen", i.Listen); local {
		return
	}
	switch {
	case c.Registry.TLS.ClientCAFile != "":
		d.fail("registry.intercept.listen", nil, "%s can be reached from elsewhere, and clients present no certificate to a proxy: registry.tls.client_ca_file would be got around", i.Listen)
	case c.Registry.Auth.Mode == AuthBasic && !c.Registry.TLS.Insecure:
		d.fail("registry.intercept.listen", nil, "%s can be reached from elsewhere, and clients tell a proxy their password in the clear: set registry.tls.insecure if that is meant", i.Listen)
	}
}

// open is the address at which clients from elsewhere are answered although
// nobody asks who they are, "" if there is none.
func (c *Config) open() string {
	if c.Registry.Auth.Mode != AuthNone || c.Registry.TLS.ClientCAFile != "" {
		return ""
	}
	addrs := []string{c.Registry.Listen, c.Registry.Intercept.Listen}
	for _, v := range c.Registry.Views {
		addrs = append(addrs, v.Listen)
	}
	for _, addr := range addrs {
		if host, _, err := net.SplitHostPort(addr); err == nil && !isLoopback(host) {
			return addr
		}
	}
	return ""
}

// validateCredentials checks, and reads, as whom an upstream is asked.
func (c *Config) validateCredentials(d *decoder, path string, u *Upstream) {
	if u.PasswordFile != "" {
		if u.Password != "" {
			d.fail(path+".password_file", nil, "password is set too")
		}
		var err error
		if u.Password, err = readSecret(u.PasswordFile); err != nil {
			d.fail(path+".password_file", nil, "%v", err)
		}
	}
	if (u.Username == "") != (u.Password == "") && !d.isSpoiled(path+".password") && !d.isSpoiled(path+".password_file") {
		d.fail(path+".username", nil, "username and password go together")
	}
	if u.DockerConfig != "" {
		if u.Username != "" {
			d.fail(path+".docker_config", nil, "username is set too")
		}
		if err := isDockerConfig(u.DockerConfig); err != nil {
			d.fail(path+".docker_config", nil, "%v", err)
		}
	}
	if open := c.open(); open != "" && u.HasCredentials() && !u.Shared {
		d.fail(path, nil, "its credentials would let every client that reaches %s have private content; set shared: true if that is meant, or registry.auth.mode", open)
	}
}

// HasCredentials tells whether the upstream may be asked as somebody.
func (u *Upstream) HasCredentials() bool { return u.Username != "" || u.DockerConfig != "" }

// isDockerConfig tells what keeps a file from being read as Docker's config.json.
// What it says is not repeated: it holds secrets.
func isDockerConfig(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var v struct {
		Auths       map[string]map[string]any `json:"auths"`
		CredsStore  string                    `json:"credsStore"`
		CredHelpers map[string]string         `json:"credHelpers"`
	}
	if json.Unmarshal(data, &v) != nil {
		return fmt.Errorf("%s is no config.json of Docker", path)
	}
	return nil
}
