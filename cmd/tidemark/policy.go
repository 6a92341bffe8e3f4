package main

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/config"
	"tidemark/proxy/front"
)

// policyOf compiles the policy that a configuration writes.
func policyOf(c *config.Config) (*audit.Policy, []audit.PolicyError) {
	a := c.Audit
	text := audit.PolicyText{
		Preset: a.Preset, FlapWindow: time.Duration(a.FlapWindow),
		DeleteObservations: a.DeleteAfter.Observations, DeleteOver: time.Duration(a.DeleteAfter.Over),
		GapFactor: a.GapFactor,
		GapAfter:  time.Duration(a.GapFactor) * time.Duration(c.Watch.Interval),
	}
	for _, r := range a.Rules {
		text.Rules = append(text.Rules, audit.RuleText{
			Name: r.Name, Match: r.Match, Tag: r.Tag, FullVersion: r.FullVersion, Mode: audit.Mode(r.Mode),
			Age: time.Duration(r.Age), Tenure: (*time.Duration)(r.Tenure), MaxLag: time.Duration(r.MaxLag),
			OnStarved: r.OnStarved, OnNew: r.OnNew, OnDeleted: r.OnDeleted, Escalate: r.Escalate, Bypass: r.Bypass,
		})
	}
	var errs []audit.PolicyError
	for _, list := range []struct {
		name string
		in   []string
		out  *[]digest.Digest
	}{{"denied", a.Denied, &text.Denied}, {"allowed", a.Allowed, &text.Allowed}} {
		for i, s := range list.in {
			d, err := digest.Parse(s)
			if err != nil {
				errs = append(errs, audit.PolicyError{Path: fmt.Sprintf("%s[%d]", list.name, i), Message: fmt.Sprintf("%q is not a digest: %v", s, err)})
			}
			*list.out = append(*list.out, d)
		}
	}
	text.Upstreams = []string{}
	for name, u := range c.Upstreams {
		text.Upstreams = append(text.Upstreams, name)
		if u.Kind == config.KindMirror {
			text.Mirrors = append(text.Mirrors, name)
		}
	}
	slices.Sort(text.Mirrors)
	slices.Sort(text.Upstreams)
	p, more := audit.Compile(text)
	if errs = append(errs, more...); len(errs) > 0 {
		return nil, errs
	}
	return p, nil
}

// checkPolicy is the part of a configuration's validation that package config
// knows nothing of.
func checkPolicy(c *config.Config, fail func(path, message string)) {
	_, errs := policyOf(c)
	for _, e := range errs {
		fail("audit."+e.Path, e.Message)
	}
}

// checkFiles looks at files whose content package config knows nothing of.
func checkFiles(c *config.Config, fail func(path, message string)) {
	checkPolicy(c, fail)
	routesOf(c, fail)
	if _, err := watched(c); err != nil {
		fail("watch.refs", err.Error())
	}
	r := c.Registry
	if r.Auth.Mode == config.AuthBasic && r.Auth.HtpasswdFile != "" {
		if _, err := front.OpenHtpasswd(r.Auth.HtpasswdFile, zerolog.Nop()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			fail("registry.auth.htpasswd_file", err.Error())
		}
	}
	if r.TLS.Mode == config.TLSFiles && r.TLS.CertFile != "" && r.TLS.KeyFile != "" {
		if _, err := front.Files(r.TLS.CertFile, r.TLS.KeyFile, zerolog.Nop()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			fail("registry.tls.cert_file", err.Error())
		}
	}
}

// loadConfig reads a configuration whole.
func loadConfig(path string, override func(*config.Config)) (*config.Config, error) {
	c, err := config.Load(path, override, checkFiles)
	if err != nil {
		where := "configuration " + path
		if path == "" {
			where = "configuration of flags and defaults"
		}
		return nil, usage(fmt.Errorf("%s:\n%w", where, err))
	}
	if c.Audit.Preset == "airgap" {
		c.Tags.Offline = true
	}
	return c, nil
}

// parsePolicy reads the policy of a configuration's text, for trying it out. The
// text is anybody's who may call the API: nothing of this machine gets into it.
func parsePolicy(text string) (*audit.Policy, error) {
	c, err := config.ParseAudit([]byte(text), checkPolicy)
	if err != nil {
		return nil, err
	}
	p, errs := policyOf(c)
	if len(errs) > 0 {
		return nil, errors.New(errs[0].Error())
	}
	return p, nil
}
