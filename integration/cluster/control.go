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

package cluster

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
)

const startTimeout = 2 * time.Minute

// Binaries is the directory of etcd, kube-apiserver and kubelet.
type Binaries string

func (b Binaries) path(name string) string { return filepath.Join(string(b), name) }

// Versions returns what the programs say of their version, by their names.
func (b Binaries) Versions(ctx context.Context) (map[string]string, error) {
	versions := map[string]string{}
	for _, name := range []string{"etcd", "kube-apiserver", "kubelet"} {
		out, err := exec.CommandContext(ctx, b.path(name), "--version").Output()
		if err != nil {
			return nil, fmt.Errorf("%s --version: %w; `make kubernetes` builds it", name, err)
		}
		first, _, _ := strings.Cut(string(out), "\n")
		fields := strings.Fields(first) // "etcd Version: 3.7.3", "Kubernetes v1.37.2"
		if len(fields) == 0 {
			return nil, fmt.Errorf("%s --version printed nothing", name)
		}
		versions[name] = strings.TrimPrefix(fields[len(fields)-1], "v")
	}
	return versions, nil
}

// Control is a running control plane: etcd and kube-apiserver.
type Control struct {
	// API is the way to kube-apiserver.
	API *API

	bin       Binaries
	dir       string
	token     string
	ca        *authority
	etcd, api *program
	kubelets  int
}

// Start starts a control plane with a RuntimeClass for the handler
// harness.Guest, of the same name. The caller has to Close it.
func Start(ctx context.Context, bin Binaries) (_ *Control, err error) {
	dir, err := os.MkdirTemp("", "gpk-")
	if err != nil {
		return nil, err
	}
	c := &Control{bin: bin, dir: dir, token: rand.Text()}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if c.ca, err = newAuthority(filepath.Join(dir, "pki")); err != nil {
		return nil, err
	}
	loopback := net.IPv4(127, 0, 0, 1)
	if err := errors.Join(
		c.ca.server("kube-apiserver", loopback),
		c.ca.client("kube-apiserver-kubelet-client"),
		c.ca.client("service-account"), // for its key
		os.WriteFile(c.join("tokens.csv"), []byte(c.token+",admin,admin,system:masters\n"), 0o600),
	); err != nil {
		return nil, err
	}

	socket := "unix://" + c.join("etcd.sock")
	peer := "unix://" + c.join("peer.sock")
	c.etcd, err = start(bin.path("etcd"), c.join("etcd.log"),
		"--name=etcd",
		"--data-dir="+c.join("etcd"),
		"--listen-client-urls="+socket, "--advertise-client-urls="+socket,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=etcd="+peer,
		"--unsafe-no-fsync", // it lives no longer than the tests
	)
	if err != nil {
		return nil, err
	}
	port, err := freePort(loopback)
	if err != nil {
		return nil, err
	}
	c.api, err = start(bin.path("kube-apiserver"), c.join("kube-apiserver.log"),
		"--etcd-servers="+socket,
		"--bind-address="+loopback.String(), "--advertise-address="+loopback.String(), "--secure-port="+port,
		"--endpoint-reconciler-type=none",
		"--tls-cert-file="+c.ca.crt("kube-apiserver"), "--tls-private-key-file="+c.ca.keyFile("kube-apiserver"),
		"--token-auth-file="+c.join("tokens.csv"), "--anonymous-auth=false", "--authorization-mode=AlwaysAllow",
		"--kubelet-client-certificate="+c.ca.crt("kube-apiserver-kubelet-client"),
		"--kubelet-client-key="+c.ca.keyFile("kube-apiserver-kubelet-client"),
		"--kubelet-certificate-authority="+c.ca.crt("ca"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+c.ca.crt("service-account"),
		"--service-account-signing-key-file="+c.ca.keyFile("service-account"),
		"--service-cluster-ip-range=10.96.0.0/24",
		// It would want a service account for each pod, which a controller makes.
		"--disable-admission-plugins=ServiceAccount",
	)
	if err != nil {
		return nil, err
	}
	c.API = newAPI("https://"+net.JoinHostPort(loopback.String(), port), c.token, c.ca.pem)
	err = c.api.wait(ctx, startTimeout, func(ctx context.Context) error {
		return c.API.do(ctx, "GET", "/readyz", nil, nil)
	})
	if err != nil {
		return nil, errors.Join(err, fmt.Errorf("the end of etcd's log:\n%s", c.etcd.logTail(10)))
	}
	err = c.API.Create(ctx, &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: harness.Guest}, Handler: harness.Guest})
	return c, err
}

// Close ends the control plane and removes its files. The kubelets have to be
// stopped before.
func (c *Control) Close() error {
	return errors.Join(c.api.stop(), c.etcd.stop(), os.RemoveAll(c.dir))
}

// LogTail returns the last lines of kube-apiserver's log.
func (c *Control) LogTail(lines int) string { return c.api.logTail(lines) }

func (c *Control) join(name string) string { return filepath.Join(c.dir, name) }

// kubeletClient is a client of the kubelets.
func (c *Control) kubeletClient() (*http.Client, error) {
	cert, err := tls.LoadX509KeyPair(c.ca.crt("kube-apiserver-kubelet-client"), c.ca.keyFile("kube-apiserver-kubelet-client"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(c.ca.cert)
	conf := &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, MinVersion: tls.VersionTLS13}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: conf}, Timeout: time.Minute}, nil
}

// freePort finds a port that nobody listens on.
func freePort(ip net.IP) (string, error) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: ip})
	if err != nil {
		return "", err
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port), nil
}
