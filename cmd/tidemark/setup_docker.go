package main

import (
	"fmt"
	"path"
	"strings"

	"github.com/spf13/cobra"
)

// Where Docker's configuration is.
const (
	dockerDaemon = "/etc/docker/daemon.json"
	dockerCerts  = "/etc/docker/certs.d"
)

func newSetupDocker() *cobra.Command {
	f := &setupFlags{}
	c := addSetup(&cobra.Command{
		Use:   "docker",
		Short: "Point Docker at this server",
		Long: `Print or write what belongs into Docker's daemon.json, so that pulls from Docker Hub
go through this server. Docker with the containerd image store also reads a
hosts.toml for each upstream, and so pulls from all of them through it. Docker with
the older stores has no mirrors for other registries: their images are pulled as
SERVER/ghcr.io/org/app, or through the proxy.

--intercept prints or writes what has Docker reach every registry through the proxy
(registry.intercept), under its own name, and with no way around it.`,
		Example: `  tidemark setup docker
  tidemark setup docker --registry https://mirror.example:5050
  tidemark setup docker -c tidemark.yaml --intercept --write`,
	}, f, func(s *site, f *setupFlags) (*plan, error) {
		if f.intercept {
			return planIntercept(s, f)
		}
		if f.proxy != "" {
			return nil, usage(fmt.Errorf("--proxy is for --intercept"))
		}
		return planDocker(s, f)
	})
	addNoFallback(c, f, "have the containerd image store ask nothing but this server")
	addForce(c, f)
	c.Flags().BoolVar(&f.intercept, "intercept", false, "have Docker reach every registry through the intercepting proxy")
	c.Flags().StringVar(&f.proxy, "proxy", "", "address at which Docker reaches the proxy (default: from the configuration); with --intercept")
	return c
}

func planDocker(s *site, f *setupFlags) (*plan, error) {
	p := &plan{
		check: certificatesInTheWay(dockerCerts, s.upstreams, f.force),
		steps: []string{"systemctl reload docker"},
	}
	// Docker takes loopback without TLS, and nothing else.
	insecure := s.registry.Scheme == "http" && !s.isLoopback()
	text := fmt.Sprintf("{ \"registry-mirrors\": [%q] }", s.registry)
	if insecure {
		text = fmt.Sprintf("{ \"registry-mirrors\": [%q], \"insecure-registries\": [%q] }", s.registry, s.registry.Host)
	}
	p.files = append(p.files, file{
		path: dockerDaemon, mode: 0o644, text: text,
		intro: fmt.Sprintf("Put this into %s, beside what is there:", dockerDaemon),
		edit: func(old []byte) ([]byte, error) {
			if insecure {
				var err error
				if old, err = addToList(old, "insecure-registries", s.registry.Host, strings.EqualFold); err != nil {
					return nil, err
				}
			}
			return addToList(old, "registry-mirrors", s.registry.String(), sameURL)
		},
	})
	caPath := path.Join(dockerCerts, s.registry.Host, "ca.crt")
	if s.ca != nil {
		p.files = append(p.files, file{
			path: caPath, mode: 0o644, edit: replaceCA(s.ca),
			intro: fmt.Sprintf("Docker must trust the CA of this server. Copy it to %s. It is %s.", caPath, s.ca.source()),
		})
	}
	p.files = append(p.files, s.hostsFiles(dockerCerts, caPath, ", which Docker 28 and later read with the containerd image store", f)...)

	p.notes = []string{
		`Docker asks "registry-mirrors" for images of Docker Hub only, and goes to the Hub itself when this server does not answer or does not have one. With the containerd image store, hosts.toml does the same for every upstream. Without it, images of other registries are pulled through this server by name:

  docker pull ` + s.registry.Host + "/ghcr.io/org/app:1.0",
	}
	if f.noFallback {
		p.notes = append(p.notes, "With these hosts.toml the containerd image store asks nothing but this server. Docker with an older store still goes to the Hub itself: only --intercept closes that way.")
	} else {
		p.notes = append(p.notes, "--no-fallback closes the way to the registry itself with the containerd image store, --intercept does with any.")
	}
	p.notes = append(p.notes, s.notes("Docker has none for mirrors: with the older image stores it sends those for Docker Hub, with the containerd image store none. Pull by name, after docker login "+s.registry.Host+", or use --intercept.")...)
	return p, nil
}

func sameURL(a, b string) bool {
	return strings.EqualFold(strings.TrimSuffix(a, "/"), strings.TrimSuffix(b, "/"))
}
