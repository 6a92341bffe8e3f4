package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// Where podman's and CRI-O's configuration of registries is.
const (
	containersMain   = "/etc/containers/registries.conf"
	containersDir    = "/etc/containers/registries.conf.d"
	containersDropIn = containersDir + "/50-tidemark.conf"
	containersCerts  = "/etc/containers/certs.d"
)

func newSetupPodman() *cobra.Command {
	f := &setupFlags{}
	c := addSetup(&cobra.Command{
		Use:   "podman",
		Short: "Point podman, buildah and skopeo at this server, for every upstream",
		Long: `Print or write a drop-in for registries.conf, which has podman, buildah and skopeo
ask this server first, and the registry itself when this server does not answer or
does not have it. With --no-fallback nothing but this server is asked.`,
		Example: `  tidemark setup podman
  tidemark setup podman -c tidemark.yaml --no-fallback --write`,
	}, f, func(s *site, f *setupFlags) (*plan, error) {
		p, err := planContainers(s, f)
		if err == nil {
			p.notes = append([]string{"podman, buildah and skopeo read these files each time they run: nothing is restarted. A registries.conf below ~/.config/containers, if there is one, is read instead."}, p.notes...)
		}
		return p, err
	})
	addNoFallback(c, f, "have podman ask nothing but this server")
	addForce(c, f)
	return c
}

func newSetupCRIO() *cobra.Command {
	f := &setupFlags{}
	c := addSetup(&cobra.Command{
		Use:   "crio",
		Short: "Point CRI-O at this server, for every upstream",
		Long: `Print or write a drop-in for registries.conf, which has CRI-O ask this server first,
and the registry itself when this server does not answer or does not have it. With
--no-fallback nothing but this server is asked. podman reads the same files.`,
		Example: `  tidemark setup crio
  tidemark setup crio -c tidemark.yaml --no-fallback --write`,
	}, f, func(s *site, f *setupFlags) (*plan, error) {
		p, err := planContainers(s, f)
		if err == nil {
			p.steps = []string{"systemctl reload crio"}
		}
		return p, err
	})
	addNoFallback(c, f, "have CRI-O ask nothing but this server")
	addForce(c, f)
	return c
}

func planContainers(s *site, f *setupFlags) (*plan, error) {
	p := &plan{}
	// The name of an upstream becomes a component of a path, where no port can be.
	var names, left []string
	for _, name := range s.upstreams {
		if strings.Contains(name, ":") {
			left = append(left, name)
		} else {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil, usage(fmt.Errorf("%s cannot be set up: a name with a port cannot be part of an image's path, which is how these clients name an upstream to a mirror", strings.Join(left, ", ")))
	}
	if s.ca != nil {
		at := path.Join(containersCerts, s.registry.Host, "ca.crt")
		p.files = append(p.files, file{
			path: at, mode: 0o644, edit: replaceCA(s.ca),
			intro: fmt.Sprintf("Copy the CA of this server to %s. It is %s.", at, s.ca.source()),
		})
	}
	text := s.registriesConf(names, f.noFallback)
	p.files = append(p.files, file{
		path: containersDropIn, mode: 0o644, edit: owned(text, f.force), text: text,
		intro: fmt.Sprintf("Write %s:", containersDropIn),
	})
	p.check = func(d machine) []error { return registriesInTheWay(d, names) }
	if f.noFallback {
		p.notes = append(p.notes, "Nothing but this server is asked for what these upstreams have: when it is down, pulls fail. Pushes go to the registry itself.")
	} else {
		p.notes = append(p.notes, "When this server does not answer, or answers with an error, the registry itself is asked. --no-fallback closes that way.")
	}
	if len(left) > 0 {
		p.notes = append(p.notes, fmt.Sprintf("Left out, and pulled from the registry itself: %s. A name with a port cannot be part of an image's path, which is how these clients name an upstream to a mirror.", strings.Join(left, ", ")))
	}
	p.notes = append(p.notes, s.notes("podman login "+s.registry.Host+" keeps them for podman, buildah and skopeo; CRI-O takes them from the global_auth_file of crio.conf.")...)
	return p, nil
}

// registriesConf is the drop-in. The name of the upstream is the first component
// of the path at which this server is asked.
//
// insecure stands with the mirror only: what stands with the registry counts for
// pushes too, which go to the registry itself. So without a fallback this server is
// there twice over plain HTTP, and what follows the mirror is no way out.
func (s *site) registriesConf(upstreams []string, noFallback bool) string {
	var b strings.Builder
	b.WriteString(written)
	for _, name := range upstreams {
		here, location := s.registry.Host+"/"+name, name
		if noFallback {
			location = here
		}
		fmt.Fprintf(&b, "\n[[registry]]\nprefix = %q\nlocation = %q\n", name, location)
		plain := s.registry.Scheme == "http"
		if !noFallback || plain {
			fmt.Fprintf(&b, "\n[[registry.mirror]]\nlocation = %q\n", here)
		}
		if plain {
			b.WriteString("insecure = true\n")
		}
	}
	return b.String()
}

// registriesInTheWay finds what other files say of the same registries. Of two
// that do, the later one counts and the earlier one is forgotten.
func registriesInTheWay(d machine, upstreams []string) (errs []error) {
	paths, err := d.list(containersDir)
	if err != nil {
		return []error{err}
	}
	for _, p := range append([]string{containersMain}, paths...) {
		if p == containersDropIn || !strings.HasSuffix(p, ".conf") {
			continue
		}
		text, at, err := d.read(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = registryInTheWay(text, upstreams)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", cmp.Or(at, p), err))
		}
	}
	return errs
}

// registryInTheWay finds a [[registry]] of one of the upstreams in a file.
func registryInTheWay(text []byte, upstreams []string) error {
	var config struct {
		Registry []struct {
			Prefix   string `toml:"prefix"`
			Location string `toml:"location"` // the prefix too, if there is none
		} `toml:"registry"`
	}
	if err := parseTOML(text, &config); err != nil {
		return err
	}
	for _, r := range config.Registry {
		if name := cmp.Or(r.Prefix, r.Location); slices.Contains(upstreams, name) {
			return fmt.Errorf("there is a [[registry]] for %s already, and only one can count: take it out, or leave this upstream out (--upstream)", name)
		}
	}
	return nil
}
