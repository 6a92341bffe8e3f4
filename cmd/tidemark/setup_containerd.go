package main

import (
	"fmt"
	"path"
	"strings"

	"github.com/spf13/cobra"
)

// Where containerd's configuration is.
const (
	containerdCerts = "/etc/containerd/certs.d"
	containerdCA    = containerdCerts + "/tidemark-ca.crt"
)

func newSetupContainerd() *cobra.Command {
	f := &setupFlags{}
	c := addSetup(&cobra.Command{
		Use:   "containerd",
		Short: "Point containerd at this server, for every upstream",
		Long: `Print or write a hosts.toml for each upstream, which has containerd ask this server
first, and the registry itself when this server does not answer or does not have
it. With --no-fallback nothing but this server is asked.`,
		Example: `  tidemark setup containerd
  tidemark setup containerd -c tidemark.yaml --no-fallback --write`,
	}, f, planContainerd)
	addNoFallback(c, f, "have containerd ask nothing but this server")
	addForce(c, f)
	return c
}

func planContainerd(s *site, f *setupFlags) (*plan, error) {
	p := &plan{check: certificatesInTheWay(containerdCerts, s.upstreams, f.force)}
	if s.ca != nil {
		p.files = append(p.files, file{
			path: containerdCA, mode: 0o644, edit: replaceCA(s.ca),
			intro: fmt.Sprintf("Copy the CA of this server to %s. It is %s.", containerdCA, s.ca.source()),
		})
	}
	p.files = append(p.files, s.hostsFiles(containerdCerts, containerdCA, "", f)...)
	p.notes = []string{`containerd reads these files at every pull: nothing is restarted. It reads them at all if /etc/containerd/config.toml says where they are (then restart containerd once):

  [plugins."io.containerd.cri.v1.images".registry]       # containerd 2
    config_path = "/etc/containerd/certs.d"

  [plugins."io.containerd.grpc.v1.cri".registry]         # containerd 1
    config_path = "/etc/containerd/certs.d"

That is for Kubernetes (CRI). ctr is told each time, nerdctl looks there by itself:

  ctr images pull --hosts-dir /etc/containerd/certs.d docker.io/library/nginx:latest`}
	if f.noFallback {
		p.notes = append(p.notes, "Nothing but this server is asked for what these upstreams have: when it is down, pulls fail. Pushes go to the registry itself.")
	} else {
		p.notes = append(p.notes, "When this server does not answer, or answers with an error, containerd goes to the registry itself. --no-fallback closes that way.")
	}
	p.notes = append(p.notes, s.notes(fmt.Sprintf("containerd takes them from [plugins.….registry.configs.%q.auth] in its config.toml, ctr from --user.", s.registry.Host))...)
	return p, nil
}

// hostsFiles are the hosts.toml of all upstreams, below a folder for them. who says
// who reads them, if that is not clear.
func (s *site) hostsFiles(dir, caPath, who string, f *setupFlags) []file {
	var files []file
	var others strings.Builder
	for _, name := range s.upstreams {
		at := path.Join(dir, name, "hosts.toml")
		own, text := s.hostsTOML(name, caPath, f.noFallback)
		files = append(files, file{path: at, mode: 0o644, edit: owned(text, f.force)})
		if len(files) == 1 {
			files[0].intro, files[0].text = fmt.Sprintf("Write %s%s:", at, who), text
			continue
		}
		fmt.Fprintf(&others, "%-56s %s", at, own)
	}
	if len(files) > 1 {
		files[1].intro, files[1].text = "and the others, which are the same but for one line:", others.String()
	}
	return files
}

// hostsTOML is an upstream's hosts.toml, and the line of it that is the
// upstream's own.
func (s *site) hostsTOML(upstream, caPath string, noFallback bool) (own, text string) {
	settings := fmt.Sprintf("dial_timeout = %q\n", dialTimeout)
	if s.ca != nil {
		settings += fmt.Sprintf("ca = %q\n", caPath)
	}
	registry := s.cfg.Upstreams[upstream].Endpoints[0]
	if noFallback {
		own = fmt.Sprintf("[host.%q]\n", registry)
		return own, written + fmt.Sprintf("server = %q\n%s\n# Pushes go to the registry itself.\n%s  capabilities = [\"push\"]\n", s.registry, settings, own)
	}
	own = fmt.Sprintf("server = %q\n", registry)
	return own, written + own + fmt.Sprintf("\n[host.%q]\n%s", s.registry, indent("capabilities = [\"pull\", \"resolve\"]\n"+settings))
}

// dialTimeout is how long containerd waits for a connection to this server before
// it goes on. Without it that is 30 s, for a machine that is gone. Versions before
// 2.1 do not know it and do not mind.
const dialTimeout = "3s"

// certificatesInTheWay finds certificates for an upstream's registry, which are
// not read any more when there is a hosts.toml beside them.
func certificatesInTheWay(dir string, upstreams []string, force bool) func(machine) []error {
	return func(d machine) (errs []error) {
		if force {
			return nil
		}
		for _, name := range upstreams {
			entries, err := d.list(path.Join(dir, name))
			if err != nil {
				errs = append(errs, err)
				continue
			}
			var certificates []string
			for _, e := range entries {
				if path.Base(e) == "hosts.toml" {
					certificates = nil // it is so already
					break
				}
				if ext := path.Ext(e); ext == ".crt" || ext == ".cert" || ext == ".key" {
					certificates = append(certificates, e)
				}
			}
			if len(certificates) > 0 {
				errs = append(errs, fmt.Errorf("%s would not be read any more with a hosts.toml beside it: name it in a hosts.toml of your own, or leave this upstream out (--upstream), or --force", strings.Join(certificates, ", ")))
			}
		}
		return errs
	}
}
