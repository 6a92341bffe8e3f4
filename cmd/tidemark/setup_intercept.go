package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"

	"tidemark/config"
)

// Where systemd takes Docker's environment from, and where the CA is for the one
// registry whose certs.d Docker's older stores do not look at: Docker Hub.
const (
	dockerUnitDir = "/etc/systemd/system/docker.service.d"
	dockerDropIn  = dockerUnitDir + "/tidemark.conf"
	dockerHubCA   = "/etc/docker/tidemark/ca.crt"
	dockerHubName = "docker.io"
)

// planIntercept has Docker reach every registry through the intercepting proxy.
func planIntercept(s *site, f *setupFlags) (*plan, error) {
	if f.noFallback {
		return nil, usage(errors.New("--intercept has no fallback to close"))
	}
	proxy, err := s.proxyURL(f)
	if err != nil {
		return nil, usage(err)
	}
	hosts := s.interceptedHosts()
	hub := slices.Contains(s.upstreams, dockerHubName)

	text := s.dockerEnvironment(proxy, hub)
	p := &plan{
		files: []file{{
			path: dockerDropIn, mode: dropInMode(proxy), edit: owned(text, f.force), text: text,
			intro: fmt.Sprintf("Write %s:", dockerDropIn),
		}},
		check: func(d machine) []error { return proxiesInTheWay(d) },
		steps: []string{"systemctl daemon-reload && systemctl restart docker"},
	}
	for _, h := range hosts {
		p.files = append(p.files, file{path: path.Join(dockerCerts, h, "ca.crt"), mode: 0o644, edit: addCA(s.ca)})
	}
	p.files[1].intro = fmt.Sprintf("Docker must trust the CA of the proxy, for these registries only. It is %s. Copy it to", s.ca.source())
	for _, h := range hosts {
		p.files[1].text += path.Join(dockerCerts, h, "ca.crt") + "\n"
	}
	if hub {
		p.files = append(p.files, file{
			path: dockerHubCA, mode: 0o644, edit: replaceCA(s.ca),
			intro: fmt.Sprintf("and, because Docker's older image stores look into no such folder for Docker Hub, to\n\n  %s\n\nwhich SSL_CERT_DIR has the Docker daemon, and nothing else, trust.", dockerHubCA),
		})
	}
	p.notes = []string{
		fmt.Sprintf(`Everything that Docker itself reaches by https then goes through %s: pulls, pushes and logins, of all registries. For the upstreams this server answers, under their own names: no image needs another name. What is no upstream must be in registry.intercept.tunnel, or Docker does not reach it: other registries, and where logins go, such as auth.docker.io.`, proxy.Redacted()),
		`There is no fallback: when this server is down, pulls fail. So there is no way around a hold either.`,
		`The CA can sign for the upstreams only. The server makes another one when it gets upstreams that this one cannot sign for: run this again then. Containers do not use the proxy, and do not trust the CA.`,
	}
	if s.cfg.Registry.Auth.Mode == config.AuthBasic && proxy.User == nil {
		if f.write {
			return nil, usage(fmt.Errorf("this server wants a name and a password (registry.auth.mode: basic): --proxy http://name:password@%s", proxy.Host))
		}
		p.notes = append([]string{"This server wants a name and a password (registry.auth.mode: basic): --proxy http://name:password@" + proxy.Host}, p.notes...)
	}
	return p, nil
}

// proxyURL is where Docker reaches the proxy.
func (s *site) proxyURL(f *setupFlags) (*url.URL, error) {
	listen := s.cfg.Registry.Intercept.Listen
	if f.proxy == "" {
		if listen == "" {
			return nil, errors.New("the intercepting proxy is off: set registry.intercept.listen in the server's configuration, such as 127.0.0.1:5052, and name that file with -c; or say with --proxy where the proxy is")
		}
		addr := clientAddr(s.cfg, listen)
		if host, port, err := net.SplitHostPort(listen); err == nil && isUnspecified(host) && f.registry != "" {
			addr = net.JoinHostPort(s.registry.Hostname(), port)
		}
		return &url.URL{Scheme: "http", Host: addr}, nil
	}
	u, err := url.Parse(f.proxy)
	if err != nil || !hostGrammar.MatchString(u.Host) || u.Port() == "" || u.Scheme != "http" || strings.TrimSuffix(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("--proxy is not an address such as http://mirror.example:5052")
	}
	return &url.URL{Scheme: u.Scheme, User: u.User, Host: u.Host}, nil
}

// dropInMode keeps a password from others.
func dropInMode(proxy *url.URL) fs.FileMode {
	if proxy.User != nil {
		return 0o600
	}
	return 0o644
}

// interceptedHosts are the hosts that Docker asks for the upstreams.
func (s *site) interceptedHosts() []string {
	var hosts []string
	for _, name := range s.upstreams {
		for _, h := range append([]string{name}, s.cfg.Upstreams[name].Hosts...) {
			if h = strings.ToLower(h); hostGrammar.MatchString(h) {
				hosts = append(hosts, h)
			}
		}
	}
	slices.Sort(hosts)
	return slices.Compact(hosts)
}

// dockerEnvironment is the drop-in. Go adds the certificates in SSL_CERT_DIR to the
// system's bundle, which is a file; the first two folders are what it would look
// into without the variable.
func (s *site) dockerEnvironment(proxy *url.URL, hub bool) string {
	text := written + "[Service]\n"
	direct := []string{"localhost", "127.0.0.1", "::1"}
	if h := s.registry.Hostname(); !slices.Contains(direct, h) {
		direct = append(direct, h)
	}
	for _, e := range []string{"HTTPS_PROXY=" + proxy.String(), "NO_PROXY=" + strings.Join(direct, ",")} {
		text += fmt.Sprintf("Environment=\"%s\"\n", strings.ReplaceAll(e, "%", "%%")) // % begins a specifier
	}
	if hub {
		text += fmt.Sprintf("Environment=\"SSL_CERT_DIR=/etc/ssl/certs:/etc/pki/tls/certs:%s\"\n", path.Dir(dockerHubCA))
	}
	return text
}

// environmentGrammar finds what the drop-in sets, set by somebody else.
var environmentGrammar = regexp.MustCompile(`(?im)^[ \t]*Environment[ \t]*=.*\b((https|no)_proxy|SSL_CERT_DIR)=`)

// proxiesInTheWay finds another proxy of Docker's, which would be used instead of
// this one or be cut off by it.
func proxiesInTheWay(d machine) (errs []error) {
	doc, at, err := d.read(dockerDaemon)
	if err == nil {
		var o *jsonObject
		if o, err = parseObject(doc); err == nil {
			for _, m := range o.members {
				if m.key == "proxies" {
					err = fmt.Errorf("%s: \"proxies\" is used instead of what systemd sets: take it out", textPlace(doc, m.at))
				}
			}
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", at, err)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	paths, err := d.list(dockerUnitDir)
	if err != nil {
		return append(errs, err)
	}
	for _, p := range paths {
		if p == dockerDropIn || !strings.HasSuffix(p, ".conf") {
			continue
		}
		text, at, err := d.read(p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if found := environmentGrammar.FindSubmatchIndex(text); found != nil {
			errs = append(errs, fmt.Errorf("%s: %s: sets %s already, and only one can count: take it out", at, textPlace(text, found[2]), text[found[2]:found[3]]))
		}
	}
	return errs
}
