/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package check

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
)

// bundled is a distribution of Kubernetes that brings a containerd of its own, which
// its kubelet uses unless it is told another.
type bundled struct {
	name  string
	units []string
	// config are the files where it is told which, as patterns; a flag in its unit
	// comes after them.
	config []string
	// socket is that of its own containerd.
	socket string
	remedy string
}

var distributions = []bundled{
	{
		name:   "k3s",
		units:  []string{"k3s.service", "k3s-agent.service"},
		config: []string{"/etc/rancher/k3s/config.yaml", "/etc/rancher/k3s/config.yaml.d/*.yaml"},
		socket: "/run/k3s/containerd/containerd.sock",
		remedy: "write container-runtime-endpoint: unix://%s into /etc/rancher/k3s/config.yaml, and restart k3s",
	},
	{
		name:   "RKE2",
		units:  []string{"rke2-server.service", "rke2-agent.service"},
		config: []string{"/etc/rancher/rke2/config.yaml", "/etc/rancher/rke2/config.yaml.d/*.yaml"},
		socket: "/run/k3s/containerd/containerd.sock",
		remedy: "write container-runtime-endpoint: unix://%s into /etc/rancher/rke2/config.yaml, and restart RKE2",
	},
	{
		name:   "MicroK8s",
		units:  []string{"snap.microk8s.daemon-kubelite.service", "snap.microk8s.daemon-kubelet.service"},
		config: []string{"/var/snap/microk8s/current/args/kubelet"},
		socket: "/var/snap/microk8s/common/run/containerd.sock",
		remedy: "write --container-runtime-endpoint=unix://%s into /var/snap/microk8s/current/args/kubelet, and restart MicroK8s",
	},
}

// endpointKey finds the endpoint as a key of YAML, or as a flag, which the installers of
// k3s and RKE2 write in quotes and on a line of its own.
var endpointKey = regexp.MustCompile(`(?m)^[^#\n]*container-runtime-endpoint["']?(?:\s*[:=]\s*|[\s\\]+)["']?([^\s"'\\]+)`)

// checkDistributions finds a Kubernetes on the node that does not use this containerd
// but one that it brought.
func (c *checker) checkDistributions() {
	address := c.Daemon.Address
	if address == "" {
		address = c.Config.Plugins.GRPC.Address
	}
	if address == "" {
		return
	}
	for _, d := range distributions {
		var (
			unit         string
			files, units []string
		)
		for _, name := range d.units {
			for _, dir := range unitDirs {
				if path := filepath.Join(dir, name); c.Host.exists(path) {
					unit = name
					units = append(units, path)
				}
			}
		}
		if unit == "" {
			continue
		}
		endpoint := d.socket
		for _, pattern := range d.config {
			files = append(files, c.Host.glob(pattern)...)
		}
		for _, f := range append(files, units...) {
			b, err := c.Host.read(f)
			if err != nil {
				continue
			}
			for _, m := range endpointKey.FindAllStringSubmatch(string(b), -1) {
				endpoint = strings.NewReplacer("${SNAP_COMMON}", "/var/snap/microk8s/common", "$SNAP_COMMON", "/var/snap/microk8s/common").
					Replace(strings.TrimPrefix(m[1], "unix://"))
			}
		}
		if filepath.Clean(endpoint) == filepath.Clean(address) || c.Host.same(endpoint, address) {
			continue
		}
		which := "the containerd"
		if endpoint == d.socket {
			which += " that it brings,"
		}
		c.add(Error, "distribution", fmt.Sprintf("%s (%s) uses %s at %s, not this one at %s", d.name, unit, which, endpoint, address),
			"the node's pods are not this containerd's: no image of theirs is left to a guest, whatever is configured here",
			fmt.Sprintf(d.remedy, address)+"; drain the node first, its pods do not move along (builder/DISTRIBUTIONS.md)")
	}
}
